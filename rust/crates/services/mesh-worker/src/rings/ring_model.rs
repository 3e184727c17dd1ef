//! A model of which this worker offers parts, and how these are fetched and loaded.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use mesh_engine_ort::{OrtOptions, Reclaim, WeightFormat};
use mesh_model::Model;
use mesh_pipeline::StageReplica;
use mesh_proto::{LayerOffer, ModelCard};

use super::progress::Progress;
use crate::config::Config;
use crate::generate::{LanguageModel, load as chat};
use crate::models::{Models, ReplicaFiles};

pub(super) struct RingModel {
    pub(super) model: LanguageModel,
    pub(super) card: ModelCard,
    pub(super) format: WeightFormat,
    pub(super) offer: LayerOffer,
    /// The replica of the store, if only parts of it may be here.
    pub(super) files: Option<Arc<ReplicaFiles>>,
}

impl RingModel {
    /// Gets the pieces that these layers need and that are not here.
    pub(super) async fn fetch(
        &self,
        layers: Range<u32>,
        models: &Arc<Models>,
        progress: &Progress,
    ) -> Result<(), String> {
        let Some(files) = &self.files else {
            return Ok(());
        };
        let pieces = files.map().layers(layers, self.model.config().layers);
        let mut fetching = pin!(models.fetch(files, pieces));
        loop {
            tokio::select! {
                fetched = &mut fetching => return fetched,
                () = tokio::time::sleep(FETCH_LOOK) => progress.fetched(files.pieces_here()),
            }
        }
    }

    /// Loads a range of layers in the weight format of that name, in the one of choice if there is no name.
    /// Blocks.
    pub(super) fn load(
        &self,
        layers: Range<u32>,
        format: &str,
        slots: u32,
        context: u32,
        config: &Config,
    ) -> Result<StageReplica, String> {
        let _reclaim = Reclaim;
        let format = match format {
            "" => self.format,
            name => WeightFormat::from_name(name)
                .ok_or_else(|| format!("weight format {name:?} is not known here"))?,
        };
        let options = OrtOptions {
            slots,
            context,
            weights: format,
            ..chat::options(config)
        };
        // A file that was written to since it was opened is opened again.
        let model = match &self.files {
            Some(files) => open_stored(files)?,
            None => open_again(&self.model, &self.card.fingerprint, config)?,
        };
        let opened = mesh_engine_ort::open(&model, layers, options, config.backend)
            .map_err(|error| error.to_string())?;
        Ok(StageReplica::new(opened.stage, KEPT_BYTES))
    }
}

/// Opens the model of a file again if the file may have been written to since, provided that it is still the
/// offered model.
fn open_again(model: &Model, fingerprint: &str, config: &Config) -> Result<Model, String> {
    if model.tensors().check_unchanged().is_ok() {
        return Ok(model.clone());
    }
    let path = model.path();
    let found = config.fingerprints().fingerprint(path);
    let found = found.map_err(|error| format!("{}: {error}", path.display()))?;
    if found != fingerprint {
        return Err(format!(
            "{} is another model than the one that was offered: restart the worker to offer it, or put the old file back",
            path.display()
        ));
    }
    Model::open(path).map_err(|error| error.to_string())
}

/// Opens the model of the replica again: it may have been written to since it was opened the last time.
fn open_stored(files: &ReplicaFiles) -> Result<Model, String> {
    let open = || {
        let path = files.path().map_err(|error| error.to_string())?;
        Model::open(path).map_err(|error| error.to_string())
    };
    // The file moves when it becomes whole, which may be just now.
    open().or_else(|_| open())
}

/// Interval at which the fetched size of a part is noted.
const FETCH_LOOK: Duration = Duration::from_secs(1);

/// Outputs that a part keeps for replays, at most.
const KEPT_BYTES: usize = 256 << 20;
