//! Results of a long run, as a table.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Rows of a table, and failures.
#[derive(Debug)]
pub struct Report {
    title: String,
    seed: u64,
    rows: Vec<(String, String, Option<bool>)>,
    failures: Vec<String>,
}

impl Report {
    /// A report without rows or failures.
    pub fn new(title: &str, seed: u64) -> Self {
        Self {
            title: title.to_owned(),
            seed,
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Adds a result; `good` is its verdict, if there is one.
    pub fn row(&mut self, what: &str, found: String, good: Option<bool>) {
        println!("{what}: {found}");
        self.rows.push((what.to_owned(), found, good));
    }

    /// Adds a failed run.
    pub fn failure(&mut self, what: String) {
        println!("FAILED: {what}");
        self.failures.push(what);
    }

    /// Number of failed runs.
    pub fn failures(&self) -> usize {
        self.failures.len()
    }

    /// True if a run failed or a row is bad.
    pub fn failed(&self) -> bool {
        !self.failures.is_empty() || self.rows.iter().any(|(_, _, good)| *good == Some(false))
    }

    /// Writes the table.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        fs::write(path, self.to_string()).with_context(|| path.display().to_string())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let build = if cfg!(debug_assertions) {
            "dev"
        } else {
            "release"
        };
        writeln!(f, "# {}\n", self.title)?;
        writeln!(
            f,
            "Seed {}, {build} build, everything on one machine with {cores} cores, SmolLM2-135M.\n",
            self.seed
        )?;
        writeln!(f, "| what | found | |\n|---|---|---|")?;
        for (what, found, good) in &self.rows {
            let verdict = match good {
                Some(true) => "as it should be",
                Some(false) => "NOT as it should be",
                None => "",
            };
            writeln!(f, "| {what} | {found} | {verdict} |")?;
        }
        if !self.failures.is_empty() {
            writeln!(f, "\nFailures:\n")?;
            for failure in &self.failures {
                writeln!(f, "- {}", failure.lines().next().unwrap_or_default())?;
            }
        }
        Ok(())
    }
}
