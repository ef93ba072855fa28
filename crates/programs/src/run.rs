//! One run of a program: its arguments, input, environment and limits, and its result.

use crate::error::{ProgramError, bounded};
use crate::program::{Program, search_path};
use crate::stop::Stop;
use crate::supervise::{Collected, Ended, Limits, supervise};
use rustix::fs::Mode;
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal, umask};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, PipeReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Maximum output on one stream, in bytes, unless a run sets another.
const MAX_OUTPUT: usize = 16 << 20;

/// One run of a program. Nothing happens until one of the methods that return a `Result` is called;
/// they wait until the program has ended, so async code calls them from a blocking task.
#[derive(Debug)]
#[must_use = "a run starts with stdout(), output() or lines()"]
pub struct Run {
    command: Which,
    args: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    clean_environment: bool,
    folder: Option<PathBuf>,
    input: Option<Vec<u8>>,
    input_file: Option<File>,
    umask: Option<Mode>,
    in_callers_group: bool,
    time_limit: Option<Duration>,
    max_output: usize,
    stop: Option<PipeReader>,
}

#[derive(Debug)]
enum Which {
    /// A program that is looked up in the search path.
    Named(Program),
    /// A program whose path the caller has found.
    File(PathBuf),
}

impl Run {
    /// Prepares a run of a program that is looked up in the search path. The program's `PATH` is
    /// the search path too.
    pub fn of(program: Program) -> Run {
        Run::new(Which::Named(program), program.time_limit())
    }

    /// Prepares a run of the program at `file`, for at most `limit`. The program gets the caller's
    /// `PATH`, in which the caller found it.
    pub fn of_file(file: &Path, limit: Duration) -> Run {
        Run::new(Which::File(file.to_owned()), Some(limit))
    }

    fn new(command: Which, time_limit: Option<Duration>) -> Run {
        Run {
            command,
            args: Vec::new(),
            environment: Vec::new(),
            clean_environment: false,
            folder: None,
            input: None,
            input_file: None,
            umask: None,
            in_callers_group: false,
            time_limit,
            max_output: MAX_OUTPUT,
            stop: None,
        }
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Run {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds a variable to the environment, which is the caller's with `LC_ALL=C`.
    pub fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Run {
        self.environment.push((name, value.into()));
        self
    }

    /// Removes the caller's variables from the program's environment.
    pub fn clean_environment(mut self) -> Run {
        self.clean_environment = true;
        self
    }

    /// Runs the program in `folder`.
    pub fn folder(mut self, folder: &Path) -> Run {
        self.folder = Some(folder.to_owned());
        self
    }

    /// Passes `bytes` as standard input, while the output is read. A program may leave them unread.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Run {
        self.input = Some(bytes.into());
        self
    }

    /// Passes a file as standard input.
    pub fn input_file(mut self, file: File) -> Run {
        self.input_file = Some(file);
        self
    }

    /// Sets the mode bits that files of the program never get.
    pub fn umask(mut self, mask: Mode) -> Run {
        self.umask = Some(mask);
        self
    }

    /// Leaves the program in the caller's process group, so that Ctrl-C at a terminal reaches it
    /// and its children. If it exceeds a limit, only the program itself is killed.
    pub fn in_callers_group(mut self) -> Run {
        self.in_callers_group = true;
        self
    }

    /// Sets the maximum output on one stream, in bytes; 16 MiB by default.
    pub fn max_output(mut self, bytes: usize) -> Run {
        self.max_output = bytes;
        self
    }

    /// Makes it possible to end the run from another thread: dropping the [`Stop`] kills the
    /// program.
    ///
    /// # Errors
    /// [`ProgramError::Start`] if the process has too many open files.
    pub fn stoppable(mut self) -> Result<(Run, Stop), ProgramError> {
        let (stop, stopped) = Stop::new().map_err(|error| self.not_started(error))?;
        self.stop = Some(stopped);
        Ok((self, stop))
    }

    /// Runs the program and returns its standard output.
    ///
    /// # Errors
    /// All of [`ProgramError`]; every exit code except 0 is a failure.
    pub fn stdout(self) -> Result<String, ProgramError> {
        self.stdout_accepting(&[0]).map(|(_, stdout)| stdout)
    }

    /// Runs a program that has several successful exit codes, and returns the code and its standard
    /// output.
    ///
    /// # Errors
    /// All of [`ProgramError`]; every exit code that is not in `codes` is a failure.
    pub fn stdout_accepting(self, codes: &[i32]) -> Result<(i32, String), ProgramError> {
        let command = self.command_line();
        let output = self.output()?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code().filter(|code| codes.contains(code)) {
            Some(code) => Ok((code, stdout)),
            None => {
                let stderr = String::from_utf8_lossy(&output.stderr);
                Err(ProgramError::Failed {
                    command,
                    status: output.status.to_string(),
                    output: bounded(&[stdout.trim(), stderr.trim()].join("\n")),
                })
            }
        }
    }

    /// Runs the program and returns its exit status and output. The caller decides whether the
    /// program succeeded.
    ///
    /// # Errors
    /// All of [`ProgramError`] except [`ProgramError::Failed`].
    pub fn output(mut self) -> Result<Output, ProgramError> {
        let mut command = self.prepared();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| self.not_started(error))?;
        drop(command);
        let streams = [child.stdout.take().map(Into::into), child.stderr.take().map(Into::into)];
        let [stdout, stderr] = streams.map(|stream| Collected::new(stream, self.max_output));
        let ([stdout, stderr], status) = self.finish(child, [stdout, stderr])?;
        let (stdout, stderr) = (stdout.into_bytes(), stderr.into_bytes());
        Ok(Output { status, stdout, stderr })
    }

    /// Runs the program, and passes each line to `line` when it is written. Returns all lines of
    /// both streams, in the order of writing.
    ///
    /// # Errors
    /// All of [`ProgramError`]; every exit code except 0 is a failure.
    pub fn lines(mut self, mut line: impl FnMut(&str)) -> Result<String, ProgramError> {
        // One pipe for both streams preserves the order of the output.
        let pipe = io::pipe().and_then(|(reader, writer)| Ok((reader, writer.try_clone()?, writer)));
        let (reader, stdout, stderr) = pipe.map_err(|error| self.not_started(error))?;
        let mut command = self.prepared();
        command.stdout(stdout).stderr(stderr);
        let child = command.spawn().map_err(|error| self.not_started(error))?;
        // The command holds the write end of the pipe; as long as it exists, the reader sees no
        // end.
        drop(command);
        let collected = Collected::new(Some(reader.into()), self.max_output).by_line(&mut line);
        let ([collected], status) = self.finish(child, [collected])?;
        let output = String::from_utf8_lossy(&collected.into_bytes()).into_owned();
        if status.success() {
            return Ok(output);
        }
        Err(ProgramError::Failed {
            command: self.command_line(),
            status: status.to_string(),
            output: bounded(&output),
        })
    }

    /// Returns the command, without its output streams.
    fn prepared(&mut self) -> Command {
        let mut command = Command::new(self.executable());
        if self.clean_environment {
            command.env_clear();
        }
        if let Which::Named(_) = self.command {
            command.env("PATH", search_path());
        }
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let stdin = match (self.input_file.take(), &self.input) {
            (Some(file), _) => file.into(),
            (None, Some(_)) => Stdio::piped(),
            (None, None) => Stdio::null(),
        };
        command
            .args(&self.args)
            .env("LC_ALL", "C")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(stdin);
        if !self.in_callers_group {
            command.process_group(0);
        }
        let (parent, mask) = (getpid(), self.umask);
        // SAFETY: a few system calls, which do not allocate and take no lock.
        unsafe {
            command.pre_exec(move || {
                if let Some(mask) = mask {
                    umask(mask);
                }
                // The kernel sends this signal when the thread that starts the program ends; that
                // thread waits for the program.
                set_parent_process_death_signal(Some(Signal::KILL))?;
                match getppid() == Some(parent) {
                    true => Ok(()),
                    // The parent died before the signal was requested.
                    false => Err(io::ErrorKind::BrokenPipe.into()),
                }
            });
        }
        command
    }

    /// Waits until the program has ended and its output is read.
    fn finish<'a, const N: usize>(
        &mut self,
        child: Child,
        streams: [Collected<'a>; N],
    ) -> Result<([Collected<'a>; N], std::process::ExitStatus), ProgramError> {
        let input = self.input.take().unwrap_or_default();
        let limits = Limits {
            time: self.time_limit,
            whole_group: !self.in_callers_group,
            stop: self.stop.take(),
        };
        match supervise(child, input, streams, limits).map_err(|error| self.not_started(error))? {
            Ended::ByItself(status, streams) => Ok((streams, status)),
            Ended::Killed(why) => Err(ProgramError::Killed {
                command: self.command_line(),
                why,
            }),
        }
    }

    fn executable(&self) -> &OsStr {
        match &self.command {
            Which::Named(program) => program.name().as_ref(),
            Which::File(file) => file.as_os_str(),
        }
    }

    fn not_started(&self, source: io::Error) -> ProgramError {
        match &self.command {
            Which::Named(program) if source.kind() == io::ErrorKind::NotFound && self.folder_exists() => {
                program.missing()
            }
            _ => ProgramError::Start {
                program: self.executable().to_string_lossy().into_owned(),
                source,
            },
        }
    }

    /// Checks the folder, because a missing folder causes the same error as a missing program.
    fn folder_exists(&self) -> bool {
        self.folder.as_ref().is_none_or(|folder| folder.is_dir())
    }

    fn command_line(&self) -> String {
        let mut command = self.executable().to_string_lossy().into_owned();
        for arg in &self.args {
            command.push(' ');
            command.push_str(&arg.to_string_lossy());
        }
        command
    }
}
