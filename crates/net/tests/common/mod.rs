//! A host, its guests and the world outside, each in a network namespace of its own, on this
//! machine.
//!
//! A namespace lives as long as a thread, a file or a socket is in it: when a test ends, however it
//! ends, the kernel takes away its links and tables. Nothing of the real host is touched, and tests
//! do not see each other.

// Each test binary uses its part of this; and what fails here is the test.
#![allow(dead_code, clippy::expect_used, clippy::panic)]

use rustix::event::{PollFd, PollFlags, poll};
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use scalebox_net::{Endpoint, NetConfig};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// For what must come: long, because machines are slow.
pub const SOON: Duration = Duration::from_secs(20);
/// For what must not come: a dropped packet has no event to wait for.
pub const NEVER: Duration = Duration::from_millis(400);

pub const SUBNET: &str = "10.77.0.0/24";
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The host's own address on the link to the world outside, and a machine there.
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

pub fn config() -> NetConfig {
    NetConfig::new("sbtest0", SUBNET.parse().expect("a subnet"), 22001..=22100).expect("a configuration")
}

/// The n-th VM: address `10.77.0.(10 + n)`, port `22001 + n`.
pub fn endpoint(n: u8) -> Endpoint {
    let ip = Ipv4Addr::new(10, 77, 0, 10 + n);
    Endpoint::new(&format!("vm-00000000000{n:x}"), ip, 22001 + u16::from(n)).expect("an endpoint")
}

/// Runs a test as a host of its own: its thread, the async runtime on it, and the programs it
/// starts.
pub fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
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
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Namespace {
        let made = std::thread::spawn(|| {
            // SAFETY: of what threads share, only the network namespace is left, and nothing here
            // relies on it being shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace (tests run as root)");
            Namespace::current()
        });
        made.join().expect("a namespace")
    }

    pub fn current() -> Namespace {
        Namespace(File::open("/proc/thread-self/ns/net").expect("the thread's namespace"))
    }

    /// Runs `f` in there, on a thread of its own.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter a namespace");
                f()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// For programs that want a path.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs a program in the namespace of the calling thread and returns what it wrote.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
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

/// `ip` with these words, in the namespace of the calling thread.
pub fn ip(words: &str) -> String {
    let arguments: Vec<&str> = words.split_whitespace().collect();
    run("ip", &arguments).unwrap_or_else(|error| panic!("ip {words}: {error}"))
}

/// `nft` with one command, in the namespace of the calling thread.
pub fn nft(command: &str) -> String {
    run("nft", &[command]).unwrap_or_else(|error| panic!("nft {command}: {error}"))
}

/// All rules and elements here, without what counters count.
pub fn rules() -> String {
    run("nft", &["--stateless", "list", "ruleset"]).unwrap_or_else(|error| panic!("nft: {error}"))
}

/// Writes a kernel setting of the calling thread's namespace.
pub fn sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// The names of the links here, `lo` and the kernel's own (ifb) left out.
pub fn links() -> Vec<String> {
    let listed = ip("-o link");
    let names = listed.lines().filter_map(|line| line.split(": ").nth(1));
    let mut names: Vec<String> = names
        .map(|name| name.split('@').next().unwrap_or(name).to_owned())
        .collect();
    names.retain(|name| name != "lo" && !name.starts_with("ifb"));
    names.sort();
    names
}

/// A machine elsewhere, linked to the host by a cable. It has no route to the guests, unless a test
/// gives it one.
pub fn outside() -> Namespace {
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

/// A machine behind a tap: a namespace with a card `eth0`, and a thread that carries frames between
/// that card and the host's tap, which it opens by name as a VMM does. On its port 22 a server says
/// `guest A.B.C.D` and then repeats what it hears.
pub struct Guest {
    pub inside: Namespace,
    _power: UnixStream,
}

impl Guest {
    /// Boots with the MAC and the address of the endpoint.
    pub fn boot(endpoint: &Endpoint) -> Guest {
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
        std::thread::spawn(move || carry(host_side, card, plug));
        Guest { inside, _power: power }
    }
}

/// Opens a tap of the calling thread's namespace, making it if there is none.
pub fn open_tap(name: &str) -> File {
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

/// A wire between two taps, until the other end of `plug` is dropped.
fn carry(a: File, b: File, plug: UnixStream) {
    let mut frame = vec![0; 1 << 16];
    loop {
        let mut ready = [
            PollFd::new(&a, PollFlags::IN),
            PollFd::new(&b, PollFlags::IN),
            PollFd::new(&plug, PollFlags::IN),
        ];
        poll(&mut ready, None).expect("poll");
        let [from_a, from_b, pulled] = ready.map(|fd| fd.revents());
        if !pulled.is_empty() {
            return;
        }
        for (events, mut from, mut to) in [(from_a, &a, &b), (from_b, &b, &a)] {
            // A tap that was deleted says so; the wire then hangs loose until the guest is dropped.
            if events.contains(PollFlags::ERR) || events.contains(PollFlags::HUP) {
                return;
            }
            if events.contains(PollFlags::IN) {
                let length = from.read(&mut frame).unwrap_or(0);
                // A card that is down or gone loses frames, as cards do.
                let _lost = to.write(&frame[..length]);
            }
        }
    }
}

/// Listens in the namespace of the calling thread: greets each client with a line that ends in the
/// client's address, and repeats what it says. The clients' addresses come out of the channel too.
pub fn serve(at: SocketAddrV4, greeting: String) -> Receiver<SocketAddr> {
    let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("listen on {at}: {error}"));
    let (seen, clients) = channel();
    std::thread::spawn(move || {
        while let Ok((client, address)) = listener.accept() {
            // The test may have dropped its end; the server goes on.
            let _unheard = seen.send(address);
            let greeting = greeting.clone();
            std::thread::spawn(move || talk(client, &greeting, address));
        }
    });
    clients
}

fn talk(mut client: TcpStream, greeting: &str, address: SocketAddr) -> io::Result<()> {
    writeln!(client, "{greeting} to {}", address.ip())?;
    io::copy(&mut client.try_clone()?, &mut client)?;
    Ok(())
}

/// A connection to one of those servers.
pub struct Session {
    reader: BufReader<TcpStream>,
    /// What the server said first.
    pub greeting: String,
}

impl Session {
    /// Connects, from the namespace of the calling thread.
    pub fn open(to: Ipv4Addr, port: u16) -> io::Result<Session> {
        Session::open_within(to, port, SOON)
    }

    pub fn open_within(to: Ipv4Addr, port: u16, limit: Duration) -> io::Result<Session> {
        let stream = TcpStream::connect_timeout(&SocketAddrV4::new(to, port).into(), limit)?;
        stream.set_read_timeout(Some(limit))?;
        let mut session = Session {
            reader: BufReader::new(stream),
            greeting: String::new(),
        };
        session.greeting = session.line()?;
        Ok(session)
    }

    /// Says a word and hears it again.
    pub fn echo(&mut self, word: &str) -> io::Result<()> {
        writeln!(self.reader.get_mut(), "{word}")?;
        let heard = self.line()?;
        if heard == word {
            Ok(())
        } else {
            Err(io::Error::other(format!("said {word:?}, heard {heard:?}")))
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

/// What the server at the other end says, or the reason why there is none.
pub fn greeting(to: Ipv4Addr, port: u16) -> String {
    Session::open(to, port).map_or_else(|error| format!("{to}:{port}: {error}"), |session| session.greeting)
}

/// Nobody answers, and not because it takes long.
#[track_caller]
pub fn unreachable(to: Ipv4Addr, port: u16) {
    if let Ok(session) = Session::open_within(to, port, NEVER) {
        panic!("{to}:{port} answered {:?}", session.greeting);
    }
}

/// Whether the machine answers a ping (RFC 792), from the namespace of the calling thread.
pub fn answers_ping(to: Ipv4Addr) -> bool {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, connect, ipproto, recv, send, socket, sockopt};
    const ECHO_REQUEST: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];
    const ECHO_REPLY: u8 = 0;
    sysctl("ipv4/ping_group_range", "0 0");
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)).expect("a ping socket");
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(NEVER)).expect("a deadline");
    connect(&socket, &SocketAddrV4::new(to, 0)).expect("connect");
    send(&socket, &ECHO_REQUEST, SendFlags::empty()).expect("send");
    let mut reply = [0; 64];
    recv(&socket, &mut reply[..], RecvFlags::empty()).is_ok() && reply[0] == ECHO_REPLY
}

/// Waits until `f` has something.
#[track_caller]
pub fn eventually<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = f() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}
