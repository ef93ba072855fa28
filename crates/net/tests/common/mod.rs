//! Simulates a host, its guests and the outside world, each in a network namespace of its own.
//!
//! A namespace exists as long as a thread, a file or a socket refers to it. However a test ends,
//! the kernel then removes its links and tables. The real host is not touched, and tests do not
//! affect each other.

// Each test binary uses only some of this; a failure here fails the test.
#![allow(dead_code, clippy::expect_used, clippy::panic)]

use rustix::event::{PollFd, PollFlags, poll};
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use scalebox_net::{Endpoint, NetConfig};
use scalebox_units::VmId;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Timeout for expected events; generous, because machines can be slow.
pub(crate) const EVENT_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout after which a packet counts as dropped, because a drop causes no event.
pub(crate) const SILENCE_TIMEOUT: Duration = Duration::from_millis(400);

pub(crate) const SUBNET: &str = "10.77.0.0/24";
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The host's address on the link to the outside, and the address of a machine there.
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

pub(crate) fn config() -> NetConfig {
    NetConfig::new("sbtest0", SUBNET.parse().expect("a subnet"), 22001..=22100).expect("a configuration")
}

/// Returns the endpoint of VM number `n`: address `10.77.0.(10 + n)`, port `22001 + n`.
pub(crate) fn endpoint(n: u8) -> Endpoint {
    let ip = Ipv4Addr::new(10, 77, 0, 10 + n);
    Endpoint::new(&id(&format!("vm-00000000000{n:x}")), ip, 22001 + u16::from(n))
}

pub(crate) fn id(text: &str) -> VmId {
    text.parse().expect("a VM id")
}

/// Runs a test on a simulated host. The test's thread, its async runtime, and the programs it
/// starts are in a new network namespace.
pub(crate) fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let namespace = Namespace::new();
    namespace.run(|| {
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(test());
    });
}

/// A network namespace.
pub(crate) struct Namespace(File);

impl Namespace {
    pub(crate) fn new() -> Namespace {
        let thread = std::thread::spawn(|| {
            // SAFETY: the only thing that threads stop sharing is the network namespace, and
            // nothing here relies on sharing it.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace (tests run as root)");
            Namespace::current()
        });
        thread.join().expect("a namespace")
    }

    pub(crate) fn current() -> Namespace {
        Namespace(File::open("/proc/thread-self/ns/net").expect("the thread's namespace"))
    }

    /// Runs `f` in the namespace, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter a namespace");
                f()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Returns a path to the namespace, for programs.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs a program in the calling thread's namespace and returns its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

/// Runs `ip` in the calling thread's namespace.
pub(crate) fn ip(words: &str) -> String {
    let arguments: Vec<&str> = words.split_whitespace().collect();
    run("ip", &arguments).unwrap_or_else(|error| panic!("ip {words}: {error}"))
}

/// Runs `nft` with one command in the calling thread's namespace.
pub(crate) fn nft(command: &str) -> String {
    run("nft", &[command]).unwrap_or_else(|error| panic!("nft {command}: {error}"))
}

/// Returns all rules and elements of the namespace, without counter values.
pub(crate) fn rules() -> String {
    run("nft", &["--stateless", "list", "ruleset"]).unwrap_or_else(|error| panic!("nft: {error}"))
}

/// Writes a kernel setting of the calling thread's namespace.
pub(crate) fn sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// Returns the names of the namespace's links, except `lo` and the kernel's own (ifb).
pub(crate) fn links() -> Vec<String> {
    let listed = ip("-o link");
    let names = listed.lines().filter_map(|line| line.split(": ").nth(1));
    let mut names: Vec<String> = names
        .map(|name| name.split('@').next().unwrap_or(name).to_owned())
        .collect();
    names.retain(|name| name != "lo" && !name.starts_with("ifb"));
    names.sort();
    names
}

/// Creates a machine in the outside world, connected to the host by a veth pair. It has no route to
/// the guests, unless a test adds one.
pub(crate) fn outside() -> Namespace {
    let world = Namespace::new();
    ip(&format!("link add up0 type veth peer name eth0 netns {}", world.path()));
    ip(&format!("addr add {HOST}/24 dev up0"));
    ip("link set up0 up");
    world.run(|| {
        ip("link set lo up");
        ip(&format!("addr add {OUTSIDE}/24 dev eth0"));
        ip("link set eth0 up");
    });
    world
}

/// A simulated guest: a namespace with an interface `eth0`, connected to the host's tap. A thread
/// copies frames between the two; it opens the tap by name as a VMM does. A server on the guest's
/// port 22 sends `guest A.B.C.D` and then echoes.
pub(crate) struct Guest {
    pub inside: Namespace,
    _power: UnixStream,
}

impl Guest {
    /// Starts a guest with the endpoint's MAC and address.
    pub(crate) fn boot(endpoint: &Endpoint) -> Guest {
        let host_side = open_tap(endpoint.tap());
        let inside = Namespace::new();
        let ip_address = endpoint.guest_ip();
        let card = inside.run(|| {
            let card = open_tap("eth0");
            ip("link set lo up");
            ip(&format!("link set eth0 address {}", endpoint.mac()));
            ip(&format!("addr add {ip_address}/24 dev eth0"));
            ip("link set eth0 up");
            ip(&format!("route add default via {GATEWAY}"));
            serve(
                SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 22),
                format!("guest {ip_address}"),
            );
            card
        });
        let (power, plug) = UnixStream::pair().expect("a pair");
        std::thread::spawn(move || copy_frames(host_side, card, plug));
        Guest { inside, _power: power }
    }
}

/// Opens a tap in the calling thread's namespace; creates it if it does not exist.
pub(crate) fn open_tap(name: &str) -> File {
    #[repr(C)]
    struct IfReq {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<std::ffi::c_int>(b'T', 202);
    const TAP_WITHOUT_INFO: u16 = 0x1002;

    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    let mut request = IfReq {
        name: [0; 16],
        flags: TAP_WITHOUT_INFO,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads one `struct ifreq`, which `IfReq` is by layout and size.
    unsafe { ioctl(&file, Setter::<TUNSETIFF, IfReq>::new(request)) }
        .unwrap_or_else(|error| panic!("open {name}: {error}"));
    file
}

/// Copies frames between two taps until the other end of `plug` is dropped.
fn copy_frames(a: File, b: File, plug: UnixStream) {
    let mut frame = vec![0; 1 << 16];
    loop {
        let mut ready = [
            PollFd::new(&a, PollFlags::IN),
            PollFd::new(&b, PollFlags::IN),
            PollFd::new(&plug, PollFlags::IN),
        ];
        poll(&mut ready, None).expect("poll");
        let [from_a, from_b, unplugged] = ready.map(|fd| fd.revents());
        if !unplugged.is_empty() {
            return;
        }
        for (events, mut from, mut to) in [(from_a, &a, &b), (from_b, &b, &a)] {
            // The tap was deleted: stop copying.
            if events.contains(PollFlags::ERR) || events.contains(PollFlags::HUP) {
                return;
            }
            if events.contains(PollFlags::IN) {
                let length = from.read(&mut frame).unwrap_or(0);
                // Frames to an interface that is down or gone are lost.
                let _lost = to.write(&frame[..length]);
            }
        }
    }
}

/// Starts a server in the calling thread's namespace. It greets each client with a line that ends
/// in the client's address, and then echoes. Also sends the clients' addresses to the returned
/// channel.
pub(crate) fn serve(at: SocketAddrV4, greeting: String) -> Receiver<SocketAddr> {
    let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("listen on {at}: {error}"));
    let (seen, clients) = channel();
    std::thread::spawn(move || {
        while let Ok((client, address)) = listener.accept() {
            // The test may have dropped the receiver; the server continues.
            let _ignored = seen.send(address);
            let greeting = greeting.clone();
            std::thread::spawn(move || greet_and_echo(client, &greeting, address));
        }
    });
    clients
}

fn greet_and_echo(mut client: TcpStream, greeting: &str, address: SocketAddr) -> io::Result<()> {
    writeln!(client, "{greeting} to {}", address.ip())?;
    io::copy(&mut client.try_clone()?, &mut client)?;
    Ok(())
}

/// A connection to a server of [`serve`].
pub(crate) struct Session {
    reader: BufReader<TcpStream>,
    /// The server's first line.
    pub greeting: String,
}

impl Session {
    /// Connects to a server from the calling thread's namespace.
    pub(crate) fn open(to: Ipv4Addr, port: u16) -> io::Result<Session> {
        Session::open_within(to, port, EVENT_TIMEOUT)
    }

    pub(crate) fn open_within(to: Ipv4Addr, port: u16, limit: Duration) -> io::Result<Session> {
        let stream = TcpStream::connect_timeout(&SocketAddrV4::new(to, port).into(), limit)?;
        stream.set_read_timeout(Some(limit))?;
        let mut session = Session {
            reader: BufReader::new(stream),
            greeting: String::new(),
        };
        session.greeting = session.line()?;
        Ok(session)
    }

    /// Sends a word and waits for its echo.
    pub(crate) fn echo(&mut self, word: &str) -> io::Result<()> {
        writeln!(self.reader.get_mut(), "{word}")?;
        let received = self.line()?;
        if received == word {
            Ok(())
        } else {
            Err(io::Error::other(format!("sent {word:?}, received {received:?}")))
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

/// Returns the server's greeting, or the error from connecting.
pub(crate) fn greeting(to: Ipv4Addr, port: u16) -> String {
    Session::open(to, port).map_or_else(|error| format!("{to}:{port}: {error}"), |session| session.greeting)
}

/// Asserts that no server responds.
#[track_caller]
pub(crate) fn unreachable(to: Ipv4Addr, port: u16) {
    if let Ok(session) = Session::open_within(to, port, SILENCE_TIMEOUT) {
        panic!("{to}:{port} responded {:?}", session.greeting);
    }
}

/// Returns whether the machine responds to a ping (RFC 792), sent from the calling thread's
/// namespace.
pub(crate) fn responds_to_ping(to: Ipv4Addr) -> bool {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, connect, ipproto, recv, send, socket, sockopt};
    const ECHO_REQUEST: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];
    const ECHO_REPLY: u8 = 0;
    sysctl("ipv4/ping_group_range", "0 0");
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)).expect("a ping socket");
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(SILENCE_TIMEOUT)).expect("a deadline");
    connect(&socket, &SocketAddrV4::new(to, 0)).expect("connect");
    send(&socket, &ECHO_REQUEST, SendFlags::empty()).expect("send");
    let mut reply = [0; 64];
    recv(&socket, &mut reply[..], RecvFlags::empty()).is_ok() && reply[0] == ECHO_REPLY
}

/// Polls until `f` returns a value.
#[track_caller]
pub(crate) fn eventually<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + EVENT_TIMEOUT;
    loop {
        if let Some(found) = f() {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out waiting for: {what}");
        std::thread::yield_now();
    }
}
