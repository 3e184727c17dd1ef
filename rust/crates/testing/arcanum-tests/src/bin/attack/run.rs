//! The run: a mesh, a phase without attacks, one with all of them, and one after.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arcanum_tests::report::Report;
use arcanum_tests::{Cluster, Undisturbed, alone};
use mesh_testkit::{Namespaces, Service, paths, until_signal};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::JoinHandle;

use crate::args::Args;
use crate::honest::{Honest, asks};
use crate::phase::{JOIN_LIMIT, Phase, compare};
use crate::sources::{self, Attack, AttackKind, Machines};
use crate::targets::Targets;
use crate::verdict::{LIMIT, LiarRecord};
use crate::watch::{HealthProbe, Processors, machine_seconds, processor_seconds};

pub(crate) async fn run(args: Args) -> Result<ExitCode> {
    let mut attacks = if args.only.is_empty() {
        sources::usual()
    } else {
        sources::named(&args.only)?
    };
    let without = sources::named(&args.without)?;
    attacks.retain(|source| !without.contains(source));
    if let Err(error) = sources::strangers_are_to_be_had() {
        println!("SKIPPED: strangers over QUIC: {error:#}");
        attacks.retain(|source| !matches!(source, AttackKind::Stranger(_)));
    }
    let _alone = alone();
    until_signal(phases(&args, &attacks)).await
}

async fn phases(args: &Args, attacks: &[AttackKind]) -> Result<ExitCode> {
    let mut report = Report::new("Attacks beside honest clients", 0);
    let mut setup = AttackSetup::start(args, &mut report).await?;
    let calm = setup.phase("calm", &[], args.calm, args).await?;
    calm.judge_calm("undisturbed", &mut report);
    match args.each {
        Some(seconds) => {
            for attack in attacks {
                let name = attack.to_string();
                let found = setup.phase(&name, &[*attack], seconds, args).await?;
                found.judge(&name, &calm, args, &mut report);
                setup.restore().await?;
            }
        }
        None => {
            let found = setup.phase("attacked", attacks, args.seconds, args).await?;
            found.judge("", &calm, args, &mut report);
            if args.after > 0 && found.deaths.is_empty() {
                let after = setup.phase("after", &[], args.after, args).await?;
                after.judge_calm("afterwards", &mut report);
                compare(&after, &calm, &mut report);
            }
        }
    }
    report.write(&args.out)?;
    println!(
        "\n{report}\nwritten to {}, logs in {}",
        args.out.display(),
        setup.logs.display()
    );
    Ok(if report.failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The mesh, and everything needed to attack it.
struct AttackSetup {
    cluster: Cluster,
    targets: Targets,
    targets_file: PathBuf,
    machines: Machines,
    undisturbed: Undisturbed,
    honest_key: String,
    /// Logs of services and attacks.
    logs: PathBuf,
    _folder: tempfile::TempDir,
}

impl AttackSetup {
    async fn start(args: &Args, report: &mut Report) -> Result<Self> {
        // The default limit of systemd services; a unit has to ask for more.
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(1_024), hard)?;
        let folder = tempfile::Builder::new()
            .prefix("hydramesh-attack-")
            .tempdir()?;
        let keys = folder.path().join("keys");
        fs::write(&keys, "honest-key\nattackers-key\n")?;
        let models_dir = folder.path().join("models");
        fs::create_dir(&models_dir)?;

        let mut undisturbed = Undisturbed::new();
        undisturbed.learn(&asks()).await?;

        let mut builder = Cluster::builder().head_config(&format!(
            "trusted_networks = [\"10.213.0.0/16\"]\n[http]\napi_keys_file = {keys:?}\n"
        ));
        let namespaces = if args.loopback {
            Err(anyhow::anyhow!("--loopback"))
        } else {
            Namespaces::new()
        };
        let place = match namespaces {
            Ok(_) => {
                builder = builder.in_namespaces()?.clients_on_network();
                "attackers on machines of their own (network namespaces)".to_owned()
            }
            Err(error) => format!("ATTACKERS SHARE THE LOOPBACK ADDRESS: {error:#}"),
        };
        report.row("where", place, None);
        let mut cluster = builder.start().await?;
        for number in 0..args.workers {
            let watched = format!("local_models = {models_dir:?}\n");
            let toml = if number == 0 { watched.as_str() } else { "" };
            cluster.add_worker(toml).await?;
        }
        cluster.mesh.wait_for_workers(args.workers).await?;
        let own = cluster.own_address();
        let shim = format!("listen = \"{own}:0\"\nadmit = \"verified\"\ntrust_loopback = false\n");
        cluster.mesh.start_shim(shim.parse()?).await?;
        let machines = Machines {
            clients: cluster.add_machine()?,
            strangers: cluster.add_machine()?,
            rogues: cluster.add_machine()?,
        };

        let registry = cluster.mesh.registry().await?;
        let mut models = registry.workers.iter().flat_map(|worker| &worker.models);
        let card = models
            .next()
            .with_context(|| format!("no model in {registry:?}"))?;
        let head = &cluster.mesh.head;
        let shim = cluster.mesh.shim.as_ref().context("a shim")?;
        let targets = Targets {
            http: head.address("http")?,
            quic: head.address("quic")?,
            clients: head.address("dcf.clients")?,
            bus: head.address("dcf.workers")?,
            shim: shim.address("ingress")?,
            key: "attackers-key".to_owned(),
            model: card.name.clone(),
            fingerprint: card.fingerprint.clone(),
            context: card.context,
            models_dir,
            model_file: paths::smollm2()?,
        };
        let targets_file = folder.path().join("targets.json");
        targets.write(&targets_file)?;
        let logs = args.out.with_extension("logs");
        fs::create_dir_all(&logs).with_context(|| logs.display().to_string())?;
        Ok(Self {
            cluster,
            targets,
            targets_file,
            machines,
            undisturbed,
            honest_key: "honest-key".to_owned(),
            logs,
            _folder: folder,
        })
    }

    async fn phase(
        &mut self,
        name: &str,
        attacks: &[AttackKind],
        seconds: u64,
        args: &Args,
    ) -> Result<Phase> {
        println!("-- {name}, {seconds} s");
        let lasts = Duration::from_secs(seconds);
        let begun = Instant::now();
        for service in self.services() {
            forget_peak(service.pid());
        }
        let honest = Honest::start(
            args.clients,
            &self.targets.http.to_string(),
            &self.honest_key,
            &self.targets.model,
            Duration::from_millis(args.think),
        )?;
        let health = HealthProbe::start(self.targets.http);
        let questions: HashSet<String> = asks().into_iter().map(|ask| ask.question).collect();
        let mut starts = self.starts(attacks, lasts).await?;
        let mut running: Vec<Attack> = Vec::new();
        let mut liars: Vec<LiarRecord> = Vec::new();
        let mut deaths: Vec<String> = Vec::new();
        let mut peaks = Peaks::default();
        let (mut services_cpu, mut attackers_cpu) = (Processors::default(), Processors::default());
        let mut registry = RegistryPoll::default();
        let mut join: Option<JoinHandle<Result<Duration>>> = None;
        let mut looked = Instant::now();
        let own = || machine_seconds() - processor_seconds(std::process::id());
        let others = own();
        while begun.elapsed() < lasts {
            while starts
                .first()
                .is_some_and(|start| start.at <= begun.elapsed())
            {
                let start = starts.remove(0);
                let rest = lasts.saturating_sub(begun.elapsed());
                let attack = Attack::start(
                    start.source,
                    &self.machines,
                    &self.targets_file,
                    start.token.as_deref(),
                    rest,
                    &self.logs,
                    args.nice,
                )?;
                if let AttackKind::Rogue(lie) = start.source {
                    liars.push(LiarRecord::new(lie, start.source.to_string()));
                }
                running.push(attack);
            }
            if join.is_none() && !attacks.is_empty() && begun.elapsed() > lasts / 2 {
                join = Some(self.join_one().await?);
            }
            peaks.look(self.services());
            self.look_for_deaths(begun, &mut deaths);
            if looked.elapsed() > Duration::from_secs(1) {
                looked = Instant::now();
                services_cpu.look(self.services().map(Service::pid).collect::<Vec<_>>());
                attackers_cpu.look(running.iter().map(Attack::pid).collect::<Vec<_>>());
                let now = registry.poll(&self.cluster).await;
                for liar in &mut liars {
                    let name = &liar.name;
                    let attack = running
                        .iter()
                        .find(|attack| attack.source.to_string() == *name);
                    if let Some(attack) = attack {
                        liar.look(attack, now.as_ref(), &questions);
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let lasted = begun.elapsed().as_secs_f64();
        let (services_cpu, attackers_cpu) = (services_cpu.used(), attackers_cpu.used());
        let others_cpu = own() - others - services_cpu - attackers_cpu;
        let health = health.end().await;
        let served = honest.end(begun, &self.undisturbed).await?;
        let mut said = Vec::new();
        for attack in running {
            said.push((attack.source, attack.end().await));
        }
        // The last request may kill a process only now.
        self.look_for_deaths(begun, &mut deaths);
        let join = match join {
            Some(join) => Some(join.await?),
            None => None,
        };
        self.keep_logs(name)?;
        Ok(Phase {
            lasted,
            served,
            health,
            head_peak: peaks.of("head"),
            worker_peaks: peaks.workers(),
            deaths,
            said,
            liars,
            join,
            services_cpu,
            attackers_cpu,
            others_cpu,
        })
    }

    fn look_for_deaths(&mut self, begun: Instant, deaths: &mut Vec<String>) {
        for service in self.services_mut() {
            let known = format!("{} died", service.name());
            if !service.is_running() && !deaths.iter().any(|death| death.starts_with(&known)) {
                let at = begun.elapsed().as_secs_f64();
                let log = service.log();
                let last = log.lines().last().unwrap_or_default();
                let death = format!("{known} after {at:.1} s; its last word: {last}");
                println!("DEAD: {death}");
                deaths.push(death);
            }
        }
    }

    /// Start time of each attack: all at once, but liars one after the other, each early enough to be judged.
    async fn starts(&self, attacks: &[AttackKind], lasts: Duration) -> Result<Vec<AttackStart>> {
        let liars = attacks
            .iter()
            .filter(|source| matches!(source, AttackKind::Rogue(_)));
        let liars = liars.count().max(1) as u32;
        let room = lasts.saturating_sub(LIMIT + Duration::from_secs(5));
        let spacing = (room / liars).min(Duration::from_secs(30));
        let mut starts = Vec::new();
        let mut liar = 0;
        for source in attacks {
            let (at, token) = match source {
                AttackKind::Rogue(_) => {
                    liar += 1;
                    (
                        spacing * (liar - 1),
                        Some(self.cluster.mesh.join_token().await?),
                    )
                }
                _ => (Duration::ZERO, None),
            };
            starts.push(AttackStart {
                at,
                source: *source,
                token,
            });
        }
        starts.sort_by_key(|start| start.at);
        Ok(starts)
    }

    /// Joins as a machine that is new would, and leaves it at that.
    async fn join_one(&self) -> Result<JoinHandle<Result<Duration>>> {
        let admin = self.cluster.mesh.join_token();
        let token = tokio::time::timeout(Duration::from_secs(10), admin).await;
        let head = self.targets.quic;
        Ok(tokio::spawn(async move {
            let token = token.context("no token within 10 s")??;
            let token = token.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
            let folder = tempfile::tempdir()?;
            let begun = Instant::now();
            let heads = [head];
            let join = mesh_net::quic::join(&heads, &token, folder.path(), "newcomer");
            tokio::time::timeout(JOIN_LIMIT * 3, join)
                .await
                .with_context(|| format!("not within {:?}", JOIN_LIMIT * 3))??;
            Ok(begun.elapsed())
        }))
    }

    /// Restarts dead services, and the head in any case, so that the next attack meets a fresh one; waits
    /// until all of it serves.
    async fn restore(&mut self) -> Result<()> {
        self.cluster.mesh.restart_head(Duration::ZERO).await?;
        for entry in fs::read_dir(&self.targets.models_dir)?.flatten() {
            let _ = fs::remove_file(entry.path());
        }
        for worker in &mut self.cluster.mesh.workers {
            if !worker.is_running() {
                println!("{} is started again", worker.name());
                worker.restart(None).await?;
            }
        }
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(60) {
            if let Ok(ready) = self.cluster.mesh.usable_workers().await
                && ready.len() >= self.cluster.mesh.workers.len()
            {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    fn services(&self) -> impl Iterator<Item = &Service> {
        let mesh = &self.cluster.mesh;
        std::iter::once(&mesh.head)
            .chain(&mesh.workers)
            .chain(&mesh.shim)
    }

    fn services_mut(&mut self) -> impl Iterator<Item = &mut Service> {
        let mesh = &mut self.cluster.mesh;
        std::iter::once(&mut mesh.head)
            .chain(&mut mesh.workers)
            .chain(&mut mesh.shim)
    }

    fn keep_logs(&self, phase: &str) -> Result<()> {
        for service in self.services() {
            let path = self.logs.join(format!("{phase}-{}.log", service.name()));
            fs::write(&path, service.log()).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

/// Start of one attack.
struct AttackStart {
    at: Duration,
    source: AttackKind,
    token: Option<String>,
}

/// Most memory of each process, as the system counts it.
#[derive(Debug, Default)]
struct Peaks(Vec<(String, u64)>);

impl Peaks {
    fn look<'a>(&mut self, services: impl Iterator<Item = &'a Service>) {
        for service in services {
            let peak = peak(service.pid());
            match self.0.iter_mut().find(|(name, _)| name == service.name()) {
                Some((_, most)) => *most = peak.max(*most),
                None => self.0.push((service.name().to_owned(), peak)),
            }
        }
    }

    fn of(&self, name: &str) -> u64 {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map_or(0, |(_, peak)| *peak)
    }

    fn workers(&self) -> Vec<(String, u64)> {
        let workers = self.0.iter().filter(|(name, _)| name.starts_with("worker"));
        workers.cloned().collect()
    }
}

/// Most bytes that a process held since [`forget_peak`].
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

fn forget_peak(pid: u32) {
    // Where it cannot be forgotten, the start counts, too.
    let _ = fs::write(
        Path::new("/proc").join(pid.to_string()).join("clear_refs"),
        "5",
    );
}

/// The registry, asked for without waiting long.
#[derive(Debug, Default)]
struct RegistryPoll {
    failures: usize,
}

impl RegistryPoll {
    async fn poll(&mut self, cluster: &Cluster) -> Option<mesh_api::Mesh> {
        let asked = tokio::time::timeout(Duration::from_secs(1), cluster.mesh.registry()).await;
        match asked {
            Ok(Ok(registry)) => Some(registry),
            _ => {
                self.failures += 1;
                None
            }
        }
    }
}
