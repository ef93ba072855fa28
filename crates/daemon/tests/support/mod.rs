//! A complete Scalebox host for a test, with its own pool, network and daemon. Tests use it through
//! the same programs and socket as users do.
//!
//! Everything is in one scratch folder and is removed with the [`Host`], even when the test fails.
#![allow(dead_code, reason = "each test uses only a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

pub(crate) mod guest;
pub(crate) mod tmux;

use rustix::fs::{FlockOperation, flock};
use scalebox_api::{CreateVm, Vm};
use scalebox_client::Client;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(crate) const TOKEN: &str = "a-token-for-tests-0123456789";
/// A public key whose private key is unknown.
pub(crate) const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8x1Y3qTqV2yqT7m3U0nVq0Z9m2hJb5p0nS9QmVb1cD";

/// Time limit for everything a test waits for; generous, because test machines are small and
/// shared.
const WAIT_TIMEOUT: Duration = Duration::from_secs(300);

/// Waits until `probe` returns a value.
pub(crate) fn eventually<T>(event: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begun.elapsed() < WAIT_TIMEOUT, "timed out waiting for {event}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Checks one guarantee of `subject`, and first prints the name of the function that checks it. The
/// last printed name is then the guarantee that failed.
pub(crate) fn guarantee<T>(subject: &mut T, check: impl FnOnce(&mut T)) {
    eprintln!("guarantee: {}", std::any::type_name_of_val(&check));
    check(subject);
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", output_of(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn output_of(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A bridge, a subnet and a range of ports that no other running test uses.
struct NetworkSlot {
    number: u16,
    _lock: File,
}

impl NetworkSlot {
    fn take() -> NetworkSlot {
        // The locks are not in TMPDIR, because concurrent test runs must see each other's locks.
        let folder = Path::new("/run/lock/scalebox-test-networks");
        fs::create_dir_all(folder).unwrap();
        let free = (0..60).find_map(|number| {
            let lock = File::create(folder.join(number.to_string())).unwrap();
            flock(&lock, FlockOperation::NonBlockingLockExclusive)
                .ok()
                .map(|()| NetworkSlot { number, _lock: lock })
        });
        free.expect("a free network for the test")
    }
}

/// Deviations from the default host.
pub(crate) struct Options<'a> {
    /// `STORAGE_SIZE` of its pool.
    pub pool_size: &'a str,
    /// The folder of the pool image; the scratch folder if `None`.
    pub image_dir: Option<&'a Path>,
    /// Additional settings.
    pub env: &'a [(&'a str, &'a str)],
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options {
            pool_size: "30G",
            image_dir: None,
            env: &[],
        }
    }
}

pub(crate) struct Host {
    pub folder: PathBuf,
    env: Vec<(String, String)>,
    daemon: Option<Child>,
    /// A program with its arguments that runs the commands.
    runner: Vec<String>,
    pub url: String,
    pub bridge: String,
    /// The beginning of the addresses of its guests, such as `172.31.7.`.
    pub guest_addresses: String,
    _slot: NetworkSlot,
    _scratch: TempDir,
}

impl Host {
    /// Creates a host with an empty pool, whose daemon is not running.
    pub(crate) fn new(options: &Options) -> Host {
        let slot = NetworkSlot::take();
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().to_owned();
        let (number, first_port) = (slot.number, 23000 + slot.number * 100);
        let bridge = format!("sbtest{number}");
        let guest_addresses = format!("172.31.{number}.");
        let image = options.image_dir.unwrap_or(&folder).join("pool.img");
        let path = |name: &str| text(&folder.join(name)).to_owned();
        let mut env: Vec<(String, String)> = [
            ("STORAGE_SIZE", options.pool_size.to_owned()),
            ("DATA_DIR", path("pool")),
            ("POOL_IMAGE", text(&image).to_owned()),
            ("STATE_DIR", path("state")),
            ("RUN_DIR", path("run")),
            ("SCALEBOX_FAULTS", path("faults")),
            ("FSTAB", path("fstab")),
            ("API_PORT", "0".to_owned()),
            ("API_TOKEN", TOKEN.to_owned()),
            ("HOST_IP", "127.0.0.1".to_owned()),
            ("BRIDGE", bridge.clone()),
            ("SUBNET", format!("{guest_addresses}0/24")),
            ("PORT_MIN", first_port.to_string()),
            ("PORT_MAX", (first_port + 99).to_string()),
            ("LOG_LEVEL", "debug,hyper=info".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        env.extend(
            options
                .env
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned())),
        );
        let host = Host {
            folder,
            env,
            daemon: None,
            runner: Vec::new(),
            url: String::new(),
            bridge,
            guest_addresses,
            _slot: slot,
            _scratch: scratch,
        };
        host.scaleboxd_ok(&["pool", "init"]);
        host
    }

    /// Creates a host with the small template `tiny`, and starts its daemon.
    pub(crate) fn with_tiny_template(options: &Options) -> Host {
        let mut host = Host::new(options);
        host.import_tiny("tiny");
        host.serve();
        host
    }

    /// Adds a template of 64 MiB that does not boot.
    pub(crate) fn import_tiny(&self, name: &str) {
        let image = self.folder.join(format!("{name}.image"));
        run("mke2fs", &["-q", "-t", "ext4", text(&image), "64M"]);
        self.scaleboxd_ok(&["template", "import", name, text(&image)]);
    }

    /// Creates the folder of a kernel, for its files, and returns it. Its id is not a digest, which
    /// nothing checks.
    pub(crate) fn kernel_folder(&self) -> PathBuf {
        let folder = self.folder.join("pool/kernels/0123456789abcdef");
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Adds the Debian template and its kernel from the cache that `make test` fills.
    pub(crate) fn import_debian(&self) {
        let cache = template_cache();
        self.scaleboxd_ok(&["template", "build", "debian-base", "--cache", text(&cache)]);
    }

    /// Adds the template `debian-dev` and its kernel in the same way.
    pub(crate) fn import_debian_dev(&self) {
        let cache = template_cache().join("debian-dev");
        self.scaleboxd_ok(&["template", "build", "debian-dev", "--cache", text(&cache)]);
    }

    pub(crate) fn scaleboxd(&self, args: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_scaleboxd");
        let mut command = match self.runner.split_first() {
            None => Command::new(program),
            Some((runner, its_args)) => {
                let mut command = Command::new(runner);
                command.args(its_args).arg(program);
                command
            }
        };
        command.args(args).args(["--config", "/dev/null"]).stdin(Stdio::null());
        for key in ["SCALEBOX_TOKEN", "SCALEBOX_URL"] {
            command.env_remove(key);
        }
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        command
    }

    pub(crate) fn scaleboxd_ok(&self, args: &[&str]) -> String {
        let output = self.scaleboxd(args).output().unwrap();
        assert!(output.status.success(), "scaleboxd {args:?}: {}", output_of(&output));
        output_of(&output)
    }

    pub(crate) fn scaleboxd_fails(&self, args: &[&str]) -> String {
        let output = self.scaleboxd(args).output().unwrap();
        // 78 is the exit status of `serve` with an invalid configuration.
        assert!(
            matches!(output.status.code(), Some(1 | 78)),
            "scaleboxd {args:?}: {}",
            output_of(&output)
        );
        output_of(&output)
    }

    /// Runs all further commands under this program.
    pub(crate) fn run_under(&mut self, runner: Option<Vec<String>>) {
        self.runner = runner.unwrap_or_default();
    }

    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.env.retain(|(known, _)| known != key);
        self.env.push((key.to_owned(), value.to_owned()));
    }

    /// Makes a step fail or kill the daemon, as described in crates/fault-points; `None` for no
    /// step.
    pub(crate) fn arm(&self, fault: Option<&str>) {
        let folder = self.faults();
        match fault {
            // The file is renamed into place, so that no step reads a partial file.
            Some(fault) => fs::write(folder.join("new"), fault)
                .and_then(|()| fs::rename(folder.join("new"), folder.join("fault")))
                .unwrap(),
            None => drop(fs::remove_file(folder.join("fault"))),
        }
    }

    /// Returns the folder from which the daemon reads the faults to inject.
    pub(crate) fn faults(&self) -> PathBuf {
        let folder = self.folder.join("faults");
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Starts the daemon and waits until it responds.
    pub(crate) fn serve(&mut self) {
        let log_path = self.log_path();
        let log = File::options().create(true).append(true).open(&log_path).unwrap();
        let already = fs::metadata(&log_path).unwrap().len() as usize;
        let mut daemon = self
            .scaleboxd(&["serve"])
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let address = eventually("the daemon", || {
            let log = fs::read(&log_path).unwrap();
            let log = String::from_utf8_lossy(&log[already..]).into_owned();
            if let Some(status) = daemon.try_wait().unwrap() {
                panic!("the daemon ended with {status}:\n{log}");
            }
            // A line without its end may still be being written.
            let mut lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let ready = lines.find(|line| line.contains(" ready "))?;
            Some(ready.split_once("address=")?.1.trim().to_owned())
        });
        self.url = format!("http://{address}");
        self.daemon = Some(daemon);
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("a running daemon").id()
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.folder.join("daemon.log")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Kills the daemon with `kill -9`, like a crash.
    pub(crate) fn crash(&mut self) {
        let mut daemon = self.daemon.take().expect("a running daemon");
        daemon.kill().unwrap();
        assert_eq!(daemon.wait().unwrap().signal(), Some(9));
    }

    /// Waits until the daemon has exited at a crash point.
    pub(crate) fn wait_for_crash(&mut self) {
        let mut daemon = self.daemon.take().expect("a running daemon");
        let status = eventually("the daemon to crash", || daemon.try_wait().unwrap());
        assert_eq!(status.signal(), Some(9), "{status}");
    }

    /// Sends SIGTERM, and returns the daemon's exit status.
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        let mut daemon = self.daemon.take().expect("a running daemon");
        send_sigterm(&daemon);
        eventually("the daemon to end", || daemon.try_wait().unwrap())
    }

    /// Sends SIGTERM without waiting.
    pub(crate) fn begin_terminating(&mut self) -> Child {
        let daemon = self.daemon.take().expect("a running daemon");
        send_sigterm(&daemon);
        daemon
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url, TOKEN).unwrap()
    }

    /// Returns a request for a stopped VM from `template`.
    pub(crate) fn stopped(&self, template: &str) -> CreateVm {
        CreateVm {
            start: false,
            ..CreateVm::new(template.parse().unwrap(), Some(KEY.parse().unwrap()))
        }
    }

    pub(crate) fn create_stopped(&self, template: &str, disk_size_gib: Option<u64>) -> Vm {
        let vm = self
            .client()
            .create_vm(&CreateVm {
                disk_size_gib,
                ..self.stopped(template)
            })
            .unwrap();
        // On a busy machine the VM's disk may be measured before the response is sent.
        Vm { storage: None, ..vm }
    }

    /// Sends raw bytes and returns status and body. The connection is closed after one response.
    pub(crate) fn raw(&self, request: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(self.url.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        // A server that rejects the request early may close the connection before all of it is
        // sent.
        let _sent = stream.write_all(request);
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status).unwrap();
        let mut rest = Vec::new();
        let _ended = reader.read_to_end(&mut rest);
        let rest = String::from_utf8_lossy(&rest).into_owned();
        let body = rest
            .split_once("\r\n\r\n")
            .map_or(String::new(), |(_, body)| body.to_owned());
        (
            status
                .split(' ')
                .nth(1)
                .unwrap_or_else(|| panic!("no status in {status:?}"))
                .parse()
                .unwrap(),
            body,
        )
    }

    /// Sends one request with the right token.
    pub(crate) fn send(&self, method: &str, path: &str, body: &[u8]) -> (u16, String) {
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        self.raw(&request)
    }

    /// Lists the leftovers of VMs on the host: disks, taps, forwards, folders of machines.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut found = names_in(&self.folder.join("pool/vms"));
        found.extend(names_in(&self.folder.join("run/vms")));
        found.extend(names_in(&self.folder.join("state/console")));
        found.extend(self.taps());
        found
    }

    /// Lists the taps on this host's bridge.
    pub(crate) fn taps(&self) -> Vec<String> {
        names_in(&Path::new("/sys/class/net").join(&self.bridge).join("brif"))
    }

    pub(crate) fn console(&self, vm: &Vm) -> PathBuf {
        self.folder.join("state/console").join(&vm.id).join("console.log")
    }

    pub(crate) fn disk(&self, vm: &Vm) -> PathBuf {
        self.folder.join("pool/vms").join(format!("{}.ext4", vm.id))
    }
}

/// Removes the disk usage from VMs, which is measured in the background.
pub(crate) fn unmeasured(vms: impl IntoIterator<Item = Vm>) -> Vec<Vm> {
    vms.into_iter().map(|vm| Vm { storage: None, ..vm }).collect()
}

fn send_sigterm(daemon: &Child) {
    let pid = rustix::process::Pid::from_child(daemon);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => panic!("{}: {error}", folder.display()),
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _killed = daemon.kill();
            let _reaped = daemon.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(80)..];
            eprintln!("---- the last lines of the daemon's log ----\n{}", last.join("\n"));
        }
        match self.scaleboxd(&["down"]).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => eprintln!("cannot stop the test's host: {}", output_of(&output)),
            Err(error) => eprintln!("cannot stop the test's host: {error}"),
        }
    }
}

/// Returns the folder where `make test` keeps the finished Debian template.
pub(crate) fn template_cache() -> PathBuf {
    match std::env::var_os("SCALEBOX_CACHE") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/template-cache"),
    }
}

/// A mounted file system of `size` in a sparse file, used as a host's disk.
pub(crate) struct HostDisk {
    pub folder: PathBuf,
    _scratch: TempDir,
}

impl HostDisk {
    pub(crate) fn ext4(size: &str) -> HostDisk {
        HostDisk::made(size, "mke2fs", &["-q", "-t", "ext4", "-m", "0"])
    }

    /// Creates a disk and formats it with the given program.
    pub(crate) fn made(size: &str, program: &str, args: &[&str]) -> HostDisk {
        let scratch = tempfile::tempdir().unwrap();
        let (image, folder) = (scratch.path().join("host.img"), scratch.path().join("host"));
        run("truncate", &["-s", size, text(&image)]);
        run(program, &[args, &[text(&image)]].concat());
        fs::create_dir(&folder).unwrap();
        run("mount", &["-o", "loop", text(&image), text(&folder)]);
        HostDisk {
            folder,
            _scratch: scratch,
        }
    }
}

impl Drop for HostDisk {
    fn drop(&mut self) {
        run("umount", &[text(&self.folder)]);
    }
}
