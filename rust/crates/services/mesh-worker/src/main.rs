//! The service binary.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use mesh_service::config::CommonArgs;
use mesh_service::failure::describe;
use mesh_service::reload::{self, Reloader};
use mesh_service::shutdown::Shutdown;
use mesh_service::{ask, telemetry};
use mesh_worker::config::WorkerFlags;
use mesh_worker::templates::{self, Templates};
use mesh_worker::{Config, Live, Worker};

/// A HydraMesh worker: loads models and answers what the head gives it.
#[derive(Debug, Parser)]
#[command(name = "mesh-worker", version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    flags: WorkerFlags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask the running worker whether it is well, for container health checks: exit code 0 if it is
    Health {
        /// Ask whether it can serve requests, not only whether it lives
        #[arg(long)]
        ready: bool,

        /// The running worker's state directory [default: as configured]
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
    },
    /// Set this worker's identity aside, so that it joins with a new token as another one: for a machine whose state directory
    /// was copied from another worker's. Stop the worker first
    NewIdentity {
        /// The worker's state directory [default: as configured]
        #[arg(long, value_name = "DIR")]
        state_dir: Option<PathBuf>,
    },
    /// What the worker starts to run chat templates in
    #[command(name = templates::COMMAND, hide = true)]
    RenderTemplates,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-worker: {}", describe(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(Command::RenderTemplates) = args.command {
        return Ok(templates::serve(io::stdin().lock(), io::stdout().lock())?);
    }
    let loaded = Config::load(&args.common, &args.flags)?;
    // Engines bring their own threads; these only carry messages.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    if let Some(Command::Health { ready, state_dir }) = &args.command {
        let path = if *ready { "/ready" } else { "/health" };
        let state_dir = state_dir.as_ref().unwrap_or(&loaded.value.state_dir);
        let answer = runtime.block_on(ask::get(state_dir, path))?;
        println!("{answer}");
        return Ok(());
    }
    if let Some(Command::NewIdentity { state_dir }) = &args.command {
        let state_dir = state_dir.as_ref().unwrap_or(&loaded.value.state_dir);
        match mesh_net::trust::set_aside(state_dir)? {
            Some(folder) => println!(
                "The old identity is in {} now. Give this worker a token from `hydramesh token create` and start it.",
                folder.display()
            ),
            None => println!("{} holds no identity.", state_dir.display()),
        }
        return Ok(());
    }
    if args.common.print_config || args.common.check_config {
        if args.common.check_config {
            loaded.value.check()?;
        }
        loaded.report(&args.common)?;
        return Ok(());
    }
    telemetry::init("worker", &args.common, loaded.value.log_level.as_deref())?;
    mesh_service::files::raise_open_files();
    let worked = runtime.block_on(async {
        let shutdown = Shutdown::on_signals(loaded.value.drain_limit)?;
        let templates = Templates::apart(std::env::current_exe()?);
        let (common, flags) = (args.common.clone(), args.flags.clone());
        let again = common.clone();
        let mut reloader = Reloader::new(&loaded.value, move || {
            let config = Config::load(&again, &flags)?.value;
            config.check()?;
            telemetry::check(config.log_level.as_deref())?;
            Ok(config)
        })?;
        let worker = tokio::select! {
            worker = Worker::start_with(loaded.value, templates, shutdown.clone()) => worker?,
            () = shutdown.draining() => return Ok(()),
        };
        let live = worker.live().clone();
        tokio::spawn(reload::follow(shutdown, move || {
            let level = |config: &Config| config.log_level.clone();
            reloader.reload(&Live::KEYS, &common, level, |config, report| {
                live.reload(config, report);
            })
        }));
        worker.wait().await?;
        Ok(())
    });
    // A model that is being read is not read to its end for nobody.
    runtime.shutdown_timeout(Duration::from_secs(1));
    worked
}
