//! Commands and files in real guests, without SSH. One guest is Debian; the others have no init: a
//! busybox root and a root with a single static program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../images/tests/support/registry.rs"]
#[allow(dead_code, reason = "this test uses only a part of it")]
mod registry;
mod support;

use registry::{Layout, PASSWORD, Registry, USER};
use scalebox_api::{CreateExec, ExecId, ExecStatus, OutputLine, Signal, SnapshotVm, UpdateVm};
use scalebox_client::{Client, Upload};
use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::guest::{Key, WAIT, create, program, scalebox, scalebox_with_input, sh, wait_for_ssh};
use support::tmux::Tmux;
use support::{Host, Options, TOKEN, eventually, guarantee, output_of, run, text};

const VM: &str = "box";

struct Scene {
    host: Host,
    client: Client,
}

#[test]
fn a_debian_guest_runs_commands_and_transfers_files_without_ssh() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    host.serve();
    let client = host.client();
    let begun = Instant::now();
    create(&client, "debian-base", VM);
    let first = sh(&client, VM, "echo ready");
    assert_eq!(first, "ready");
    println!("POST /vms to the first exec: {:.1} s", begun.elapsed().as_secs_f64());
    let mut scene = Scene { host, client };
    guarantee(&mut scene, commands_have_their_own_output_status_user_and_signals);
    guarantee(&mut scene, files_arrive_whole_and_with_their_mode);
    guarantee(&mut scene, the_command_line_passes_streams_and_status_on);
    guarantee(
        &mut scene,
        a_shell_in_tmux_redraws_resizes_interrupts_and_returns_its_status,
    );
    guarantee(&mut scene, a_killed_daemon_loses_no_line_of_a_background_command);
    guarantee(&mut scene, a_disk_grows_and_the_agent_confirms_it);
    guarantee(&mut scene, a_snapshot_contains_nothing_of_the_agent);
    guarantee(&mut scene, a_rebooted_guest_is_reached_again);
    guarantee(&mut scene, ssh_and_the_agent_are_timed_in_one_run);
}

fn commands_have_their_own_output_status_user_and_signals(scene: &mut Scene) {
    let run = |request: CreateExec| scene.client.run_exec(VM, &request).unwrap();
    let ended = run(CreateExec::of_command("echo out; echo err >&2; exit 7"));
    assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(ended.exit_code, Some(7));
    let as_user = CreateExec {
        user: Some("user".parse().unwrap()),
        cwd: Some("/tmp".parse().unwrap()),
        env: [("GREETING".to_owned(), "hello world".to_owned())].into(),
        stdin: Some("typed".into()),
        ..CreateExec::of_command("id -un; pwd; echo $GREETING; cat; echo; echo $HOME")
    };
    assert_eq!(run(as_user).stdout, "user\n/tmp\nhello world\ntyped\n/home/user\n");
    let slow = CreateExec {
        timeout_seconds: Some(1),
        ..CreateExec::of_command("sleep 1000 & sleep 1000")
    };
    let ended = run(slow);
    assert!(ended.timed_out && ended.exit_code.is_none(), "{ended:?}");
    eventually("the end of the whole process group", || {
        (sh(&scene.client, VM, "pgrep -c sleep || true") == "0").then_some(())
    });
}

fn files_arrive_whole_and_with_their_mode(scene: &mut Scene) {
    let content: Vec<u8> = (0..5 << 20).map(|at: u32| (at % 251) as u8).collect();
    let path = "/root/some file".parse().unwrap();
    let upload = Upload {
        mode: Some("0750".parse().unwrap()),
        ..Upload::default()
    };
    let reader = Cursor::new(content.clone());
    let written = scene.client.write_file(VM, &path, &upload, reader, None).unwrap();
    assert_eq!(written.size, content.len() as u64);
    assert_eq!(
        sh(&scene.client, VM, "stat -c '%a %U %s' '/root/some file'"),
        "750 root 5242880"
    );
    let mut read = Vec::new();
    let mut download = scene.client.read_file(VM, &path).unwrap();
    download.content.read_to_end(&mut read).unwrap();
    assert!(read == content, "the content differs");
    scene.client.delete_file(VM, &path, false).unwrap();
}

fn the_command_line_passes_streams_and_status_on(scene: &mut Scene) {
    let output = scalebox(
        &scene.host,
        &["exec", VM, "--", "sh", "-c", "echo out; echo err >&2; exit 3"],
    );
    assert_eq!(output.status.code(), Some(3), "{}", output_of(&output));
    assert_eq!((&*output.stdout, &*output.stderr), (&b"out\n"[..], &b"err\n"[..]));
    let folder = scene.host.folder.join("copied");
    fs::create_dir_all(folder.join("below")).unwrap();
    fs::write(folder.join("below/file"), "content\n").unwrap();
    let output = scalebox(&scene.host, &["cp", "-r", text(&folder), &format!("{VM}:/srv/copied")]);
    assert!(output.status.success(), "{}", output_of(&output));
    assert_eq!(sh(&scene.client, VM, "cat /srv/copied/below/file"), "content");
}

fn a_shell_in_tmux_redraws_resizes_interrupts_and_returns_its_status(scene: &mut Scene) {
    let program = program("scalebox");
    let command = format!(
        "HOME={} SCALEBOX_URL={} SCALEBOX_TOKEN={TOKEN} {} shell {VM}; echo status $?; stty -a; sleep 1000",
        text(&scene.host.folder),
        scene.host.url,
        text(&program)
    );
    let tmux = Tmux::start(&scene.host.folder, 30, 100, &command);
    let has = |text: &'static str| move |screen: &[String]| screen.iter().any(|line| line == text);
    let prompt = |screen: &[String]| {
        let last = screen.iter().rfind(|line| !line.is_empty());
        last.is_some_and(|line| line.ends_with('#'))
    };
    tmux.wait_for("a prompt", prompt);
    tmux.enter("cd; stty size");
    tmux.wait_for("the size of the window", has("30 100"));

    an_editor_draws_on_the_whole_window(&tmux);

    let back = tmux.wait_for("the shell again", |screen| prompt(screen) && has("30 100")(screen));
    assert!(
        !back.iter().any(|line| line.contains("nano 7")),
        "the editor is still there"
    );
    tmux.enter("clear; stty size; cat poem");
    tmux.wait_for("the new size, and the file", |screen| {
        has("18 70")(screen) && has("first line")(screen) && has("second line: ä")(screen)
    });

    tmux.enter("clear; sleep 1000");
    eventually("the command", || {
        (sh(&scene.client, VM, "pgrep -cx sleep || true") == "1").then_some(())
    });
    tmux.press(&["C-c"]);
    tmux.wait_for("the prompt after Ctrl-C", |screen| prompt(screen) && has("^C")(screen));
    tmux.enter("echo code $?");
    tmux.wait_for("the status of the command", has("code 130"));
    tmux.enter("exit 7");
    let ended = tmux.wait_for("the status of the shell", |screen| {
        has("status 7")(screen) && screen.iter().any(|line| line.contains("icanon"))
    });
    assert!(
        !ended.iter().any(|line| line.contains("-icanon")),
        "the terminal stays raw"
    );
}

/// Writes a file with nano, while the window is resized.
fn an_editor_draws_on_the_whole_window(tmux: &Tmux) {
    let help_is_last = |rows: usize| {
        move |screen: &[String]| {
            let first = screen.first().is_some_and(|line| line.contains("GNU nano"));
            first && screen.len() == rows && screen[rows - 1].contains("^X Exit")
        }
    };
    tmux.enter("nano poem");
    tmux.wait_for("the editor", help_is_last(30));
    tmux.enter("first line");
    tmux.type_text("second line: ä");
    let typed = |screen: &[String]| screen.iter().any(|line| line == "second line: ä");
    tmux.wait_for("the typed text", typed);
    tmux.resize(18, 70);
    tmux.wait_for("the redrawn editor", |screen| help_is_last(18)(screen) && typed(screen));
    tmux.press(&["C-o", "Enter"]);
    tmux.wait_for("the message", |screen| {
        screen.iter().any(|line| line.contains("Wrote 2 lines"))
    });
    tmux.press(&["C-x"]);
}

/// Reads the lines of a background command until the daemon is killed, and from that offset after
/// its restart.
fn a_killed_daemon_loses_no_line_of_a_background_command(scene: &mut Scene) {
    let counter = "i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo line $i; sleep 0.05; done";
    let exec = scene.client.start_exec(VM, &CreateExec::of_command(counter)).unwrap();
    let (mut output, mut offset) = (String::new(), 0);
    for line in scene.client.exec_output(VM, &exec, 0, true).unwrap().take(20) {
        take(line.unwrap(), &mut output, &mut offset);
    }
    scene.host.crash();
    scene.host.serve();
    scene.client = scene.host.client();
    for line in scene.client.exec_output(VM, &exec, offset, true).unwrap() {
        take(line.unwrap(), &mut output, &mut offset);
    }
    let expected: String = (1..=200).map(|number| format!("line {number}\n")).collect();
    assert_eq!(output, expected);
}

fn take(line: OutputLine, output: &mut String, next: &mut u64) {
    match line {
        OutputLine::Stdout { bytes, offset } => {
            assert_eq!(offset, *next, "a gap or a repetition");
            *next += bytes.len() as u64;
            output.push_str(std::str::from_utf8(&bytes).unwrap());
        }
        OutputLine::Exit { exit: end } => assert_eq!(end.exit_code, Some(0)),
        OutputLine::Started { .. } => {}
        other => panic!("{other:?}"),
    }
}

fn a_disk_grows_and_the_agent_confirms_it(scene: &mut Scene) {
    let bigger = UpdateVm {
        disk_size_gib: Some(6),
        ..UpdateVm::default()
    };
    let vm = scene.client.update_vm(VM, &bigger).unwrap();
    assert_eq!(vm.disk_size_gib, 6);
    eventually("the growth of the file system", || {
        let size: u64 = sh(&scene.client, VM, "df --output=size -BG / | tail -1 | tr -dc 0-9")
            .parse()
            .unwrap();
        (size >= 5).then_some(())
    });
}

fn a_snapshot_contains_nothing_of_the_agent(scene: &mut Scene) {
    let request = SnapshotVm {
        template_name: "kept".parse().unwrap(),
    };
    scene.client.snapshot_vm(VM, &request).unwrap();
    let image = image_of(&scene.host, "kept");
    // The status 1 means no match.
    let searched = Command::new("grep")
        .args(["-q", "-a", "scalebox-agent hello", text(&image)])
        .status();
    assert_eq!(searched.unwrap().code(), Some(1), "the agent's program is in the image");
}

fn image_of(host: &Host, template: &str) -> PathBuf {
    host.folder.join("pool/templates").join(format!("{template}.ext4"))
}

fn a_rebooted_guest_is_reached_again(scene: &mut Scene) {
    let boot = |client: &Client| sh(client, VM, "cat /proc/sys/kernel/random/boot_id");
    let before = boot(&scene.client);
    let _ended = scene.client.run_exec(VM, &CreateExec::of_command("systemctl reboot"));
    eventually("another boot", || {
        let read = CreateExec::of_command("cat /proc/sys/kernel/random/boot_id");
        let ended = scene.client.run_exec(VM, &read).ok()?;
        (ended.exit_code == Some(0) && ended.stdout.trim() != before).then_some(())
    });
}

fn ssh_and_the_agent_are_timed_in_one_run(scene: &mut Scene) {
    let key = Key::new(&scene.host, "key");
    let begun = Instant::now();
    let vm = scene.client.create_vm_and_wait(&key.request("timed"), WAIT);
    let vm = vm.unwrap();
    sh(&scene.client, "timed", "true");
    let agent = begun.elapsed();
    wait_for_ssh(&vm);
    let ssh = begun.elapsed();
    let mut execs: Vec<Duration> = (0..20)
        .map(|_| {
            let begun = Instant::now();
            sh(&scene.client, "timed", "true");
            begun.elapsed()
        })
        .collect();
    execs.sort();
    println!(
        "POST /vms to the first exec {:.1} s, to SSH {:.1} s: {:.2}; exec of `true`, p50: {:.1} ms",
        agent.as_secs_f64(),
        ssh.as_secs_f64(),
        agent.as_secs_f64() / ssh.as_secs_f64(),
        execs[10].as_secs_f64() * 1000.0
    );
}

/// Creates a root file system of busybox, without an init.
fn busybox_root(folder: &Path) -> PathBuf {
    let root = folder.join("busybox-root");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "echo", "id", "hostname", "ip", "ps", "df", "sleep"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n",
    )
    .unwrap();
    root
}

fn import(host: &Host, name: &str, root: &Path) {
    let image = host.folder.join(format!("{name}.ext4"));
    run("mke2fs", &["-q", "-t", "ext4", "-d", text(root), text(&image), "64M"]);
    host.scaleboxd_ok(&["template", "import", name, text(&image)]);
}

#[test]
fn roots_without_an_init_boot_with_the_agent_as_process_1() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    let root = busybox_root(&host.folder);
    import(&host, "alpine-like", &root);
    let single = host.folder.join("single-root");
    fs::create_dir_all(&single).unwrap();
    fs::copy("/bin/busybox", single.join("busybox")).unwrap();
    import(&host, "distroless-like", &single);
    host.serve();
    let client = host.client();
    let mut scene = Scene { host, client };
    guarantee(&mut scene, a_busybox_root_has_name_network_and_users);
    guarantee(&mut scene, a_root_of_one_program_runs_it_and_grows);
}

fn a_busybox_root_has_name_network_and_users(scene: &mut Scene) {
    let begun = Instant::now();
    create(&scene.client, "alpine-like", "alp");
    assert_eq!(sh(&scene.client, "alp", "hostname"), "alp");
    println!(
        "POST /vms to the first exec without an init: {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let addresses = sh(&scene.client, "alp", "ip -4 -o address show dev eth0");
    let ours = format!("inet {}", scene.host.guest_addresses);
    assert!(addresses.contains(&ours), "{addresses}");
    assert!(sh(&scene.client, "alp", "ip route").contains("default via"));
    assert!(sh(&scene.client, "alp", "cat /etc/resolv.conf").contains("nameserver"));
    let as_web = CreateExec {
        user: Some("web".parse().unwrap()),
        ..CreateExec::of_command("id -u; echo $HOME")
    };
    assert_eq!(scene.client.run_exec("alp", &as_web).unwrap().stdout, "33\n/srv\n");
    let zombies = sh(
        &scene.client,
        "alp",
        "(sleep 0.1 &); sleep 1; ps -o stat,comm | grep -c '^Z' || true",
    );
    assert_eq!(zombies, "0");
    scene.client.stop_vm("alp").unwrap();
    scene.client.delete_vm("alp").unwrap();
}

fn a_root_of_one_program_runs_it_and_grows(scene: &mut Scene) {
    create(&scene.client, "distroless-like", "one");
    let tool = |arguments: &[&str]| {
        let argv = arguments.iter().map(|&word| word.to_owned()).collect();
        scene.client.run_exec("one", &CreateExec::of_argv(argv)).unwrap()
    };
    assert_eq!(tool(&["/busybox", "echo", "hello"]).stdout, "hello\n");
    let bigger = UpdateVm {
        disk_size_gib: Some(4),
        ..UpdateVm::default()
    };
    scene.client.update_vm("one", &bigger).unwrap();
    eventually("the growth of the file system", || {
        let size = tool(&["/busybox", "df", "-m", "/"]).stdout;
        let blocks: u64 = size.lines().last()?.split_whitespace().nth(1)?.parse().ok()?;
        (blocks > 3500).then_some(())
    });
    scene.client.delete_vm("one").unwrap();
}

/// Makes an Alpine-like image with settings, as users pull it.
fn tools_image(folder: &Path) -> Layout {
    let layout = Layout::new();
    layout.layer(|root| {
        for entry in fs::read_dir(busybox_root(folder)).unwrap() {
            let from = entry.unwrap().path();
            run("cp", &["-a", text(&from), text(root)]);
        }
        fs::create_dir(root.join("sbin")).unwrap();
        std::os::unix::fs::symlink("/bin/busybox", root.join("sbin/init")).unwrap();
        fs::create_dir(root.join("srv")).unwrap();
        std::os::unix::fs::chown(root.join("srv"), Some(33), Some(33)).unwrap();
    });
    let script = "trap 'echo asked to end > end; exit 0' QUIT; echo \"started as $(id -u) in $PWD with $MODE\"; \
                  while :; do sleep 0.2; done";
    let settings = [
        "--config.workingdir=/srv",
        "--config.user=web",
        "--config.stopsignal=SIGQUIT",
    ];
    layout.config(&settings);
    layout.config(&[
        "--config.env=MODE=image",
        "--config.entrypoint=/bin/sh",
        "--config.entrypoint=-c",
    ]);
    layout.config(&["--config.cmd", script]);
    layout
}

#[test]
fn an_image_of_a_registry_runs_one_command_and_leaves_nothing() {
    let mut host = Host::new(&Options::default());
    host.import_debian();
    let registry = Registry::start();
    registry.push(&tools_image(&host.folder), "team/tools:1");
    host.serve();
    let image = format!("{}/team/tools:1", registry.host);
    let refused = scalebox(&host, &["run", &image, "--", "true"]);
    assert_ne!(refused.status.code(), Some(0));
    assert!(output_of(&refused).contains("denies access"), "{}", output_of(&refused));
    let pull = ["template", "pull", &image, "--username", USER];
    let pulled = scalebox_with_input(&host, &pull, PASSWORD);
    assert!(pulled.status.success(), "{}", output_of(&pulled));
    let begun = Instant::now();
    let command = ["run", &image, "--", "sh", "-c", "echo from the image; exit 5"];
    let output = scalebox(&host, &command);
    assert_eq!(output.status.code(), Some(5), "{}", output_of(&output));
    assert!(
        String::from_utf8_lossy(&output.stdout).ends_with("from the image\n"),
        "{}",
        output_of(&output)
    );
    println!("scalebox run of a pulled image: {:.1} s", begun.elapsed().as_secs_f64());
    let client = host.client();
    assert!(client.vms().unwrap().is_empty(), "the VM is left");
    let mut scene = Scene { host, client };
    guarantee(&mut scene, the_main_process_of_an_image_is_supervised);
    guarantee(
        &mut scene,
        a_guest_that_stops_asks_its_main_process_by_the_signal_of_the_image,
    );
}

fn the_main_process_of_an_image_is_supervised(scene: &mut Scene) {
    let (host, client) = (&scene.host, &scene.client);
    let create = [
        "vm",
        "create",
        "tools-1",
        "--name",
        "web",
        "--env",
        "MODE=vm",
        "--restart",
        "always",
        "--wait",
    ];
    let created = scalebox(host, &create);
    assert!(created.status.success(), "{}", output_of(&created));
    assert!(
        output_of(&created).contains("scalebox shell web"),
        "{}",
        output_of(&created)
    );
    let line = "started as 33 in /srv with vm\n";
    let logs = |times: usize| {
        eventually("the output of the main process", || {
            let logs = scalebox(host, &["logs", "web"]);
            (logs.stdout == line.repeat(times).as_bytes()).then_some(())
        });
    };
    logs(1);
    let main = ExecId::main();
    client.signal_exec("web", &main, Signal::KILL).unwrap();
    logs(2);
    let status = client.exec("web", &main).unwrap();
    assert_eq!((status.status, status.restarts), (ExecStatus::Running, Some(1)));
    // Other commands have the same user, folder and environment.
    let command = "echo $(id -u) $PWD $MODE; ps -o pid,args | grep -c '[s]tarted as'";
    assert_eq!(sh(client, "web", command), "33 /srv vm\n1");
    let shown = scalebox(host, &["vm", "get", "web"]);
    assert!(
        output_of(&shown).contains("(always restarted)"),
        "{}",
        output_of(&shown)
    );
    // The console is a log of its own.
    let console = scalebox(host, &["logs", "--console", "web"]);
    assert!(!output_of(&console).contains("started as"), "{}", output_of(&console));
}

fn a_guest_that_stops_asks_its_main_process_by_the_signal_of_the_image(scene: &mut Scene) {
    let client = &scene.client;
    client.stop_vm("web").unwrap();
    client.start_vm("web").unwrap();
    eventually("the main process after a start", || {
        let status = client.exec("web", &ExecId::main()).ok()?;
        (status.status == ExecStatus::Running).then_some(())
    });
    assert_eq!(sh(client, "web", "cat end"), "asked to end");
    client.delete_vm("web").unwrap();
}
