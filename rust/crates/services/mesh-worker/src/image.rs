//! Images: models that make them, in builds with the feature `images`; other builds say that they lack it.

#[cfg(feature = "images")]
mod codec;
#[cfg(feature = "images")]
mod load;

#[cfg(feature = "images")]
pub(crate) use load::load;

/// The workload of models for images.
#[cfg(feature = "images")]
pub(crate) type ImageWork = mesh_diffusion::imaging::Imaging<load::Quiet>;

/// This build has no libtorch.
#[cfg(not(feature = "images"))]
pub(crate) fn load(
    path: &std::path::Path,
    _: Option<&str>,
    _: Option<&str>,
    _: &crate::config::Config,
) -> Result<crate::served::ServedModel, crate::error::WorkerError> {
    Err(crate::error::WorkerError::NoImages { path: path.into() })
}

#[cfg(all(test, not(feature = "images")))]
mod tests {
    use crate::config::Config;
    use crate::served::ServedModel;
    use crate::templates::Templates;
    use crate::vram::Vram;

    #[test]
    fn an_image_model_in_a_build_without_libtorch_names_the_package_that_has_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(mesh_model::image::INDEX), "{}").unwrap();
        let (config, templates) = (Config::default(), Templates::here());
        let loaded = ServedModel::load(
            folder.path(),
            None,
            None,
            &config,
            &templates,
            &Vram::new(&config),
        );
        let error = loaded.err().unwrap().to_string();
        assert!(
            error.contains("hydramesh-images") && error.contains("--features images"),
            "{error}"
        );
    }
}
