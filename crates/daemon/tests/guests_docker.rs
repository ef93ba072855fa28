//! Docker in a guest of the template `debian-dev`, with the kernel modules of the shared drive.
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

use registry::Layout;
use scalebox_api::{CreateExec, CreateVm, Vm};
use scalebox_client::{Client, Upload};
use std::fs::{self, File};
use std::path::Path;
use std::time::Instant;
use support::guest::sh;
use support::{Host, Options, eventually, guarantee, run, text};

const VM: &str = "docker";

struct Scene {
    host: Host,
    client: Client,
    vm: Vm,
}

#[test]
fn docker_runs_containers_in_a_guest_of_debian_dev() {
    let mut host = Host::new(&Options::default());
    host.import_debian_dev();
    host.serve();
    let client = host.client();
    let request = CreateVm {
        name: Some(VM.parse().unwrap()),
        start: false,
        ..CreateVm::new("debian-dev".parse().unwrap(), None)
    };
    let vm = client.create_vm(&request).unwrap();
    let mut scene = Scene { host, client, vm };
    scene.boot_without_modules_of_its_own();
    guarantee(&mut scene, Scene::a_loaded_image_prints_its_output);
    guarantee(&mut scene, Scene::an_imported_root_is_published_limited_and_confined);
}

impl Scene {
    /// Starts the VM with a root file system that has no modules of its kernel, like one of an
    /// image.
    fn boot_without_modules_of_its_own(&mut self) {
        let disk = self.host.disk(&self.vm);
        let found = run("debugfs", &["-R", "ls -p /usr/lib/modules", text(&disk)]);
        let version = found.split('/').find(|name| name.ends_with("-amd64")).expect(&found);
        let list = format!("rm /usr/lib/modules/{version}/modules.dep");
        run("debugfs", &["-w", "-R", &list, text(&disk)]);
        let begun = Instant::now();
        self.client.start_vm(VM).unwrap();
        let ready = CreateExec {
            timeout_seconds: Some(280),
            ..CreateExec::of_command("until [ -S /run/docker.sock ]; do sleep 1; done; docker info")
        };
        let ready = eventually("the agent", || self.client.run_exec(VM, &ready).ok());
        println!(
            "start to a Docker that responds: {:.1} s",
            begun.elapsed().as_secs_f64()
        );
        assert_eq!(ready.exit_code, Some(0), "{ready:?}");
        for line in ["Storage Driver: overlay2", "Cgroup Version: 2", "apparmor"] {
            assert!(ready.stdout.contains(line), "{line}: {}", ready.stdout);
        }
        let mounted = "findmnt -n -o SOURCE --mountpoint /usr/lib/modules/$(uname -r)";
        assert_eq!(sh(&self.client, VM, mounted), "/dev/vdc");
    }

    fn a_loaded_image_prints_its_output(&mut self) {
        let layout = Layout::new();
        layout.layer(busybox_in);
        layout.config(&["--config.entrypoint=/bin/sh", "--config.env=GREETING=hello"]);
        let archive = self.host.folder.join("image.tar");
        let target = format!("docker-archive:{}:tools:1", text(&archive));
        run("skopeo", &["copy", "-q", &layout.image(), &target]);
        self.upload(&archive);
        sh(&self.client, VM, "docker load -q -i /root/image.tar");
        let begun = Instant::now();
        let route = "docker run --rm tools:1 -c 'echo $GREETING; ip route'";
        let printed = sh(&self.client, VM, route);
        println!("docker run: {:.1} s", begun.elapsed().as_secs_f64());
        assert!(printed.starts_with("hello\ndefault via 172.17.0.1 "), "{printed}");
        // The packets of a container leave the guest with the guest's address.
        let ping = format!("docker run --rm tools:1 -c 'ping -c 1 -w 60 {}'", self.gateway());
        assert!(sh(&self.client, VM, &ping).contains("1 packets received"));
    }

    fn an_imported_root_is_published_limited_and_confined(&mut self) {
        let root = self.host.folder.join("root");
        busybox_in(&root);
        fs::write(root.join("page"), "from the container\n").unwrap();
        let archive = self.host.folder.join("root.tar");
        run("tar", &["-C", text(&root), "-cf", text(&archive), "."]);
        self.upload(&archive);
        sh(&self.client, VM, "docker import /root/root.tar web");
        sh(
            &self.client,
            VM,
            "docker run -d --name web -p 8000:80 -m 64m web /bin/busybox httpd -f -h /",
        );
        // Published for the host, through the guest's network card.
        let address = "ip -4 -br address show eth0 | tr -s ' ' | cut -d' ' -f3";
        let address = sh(&self.client, VM, address);
        let page = format!("http://{}:8000/page", address.split('/').next().unwrap());
        let got = run("curl", &["-sS", "--retry", "60", "--retry-connrefused", &page]);
        assert_eq!(got, "from the container\n");
        let inside = |file: &str| sh(&self.client, VM, &format!("docker exec web /bin/cat {file}"));
        assert_eq!(inside("/sys/fs/cgroup/memory.max"), "67108864");
        assert_eq!(inside("/proc/self/attr/current"), "docker-default (enforce)");
    }

    fn gateway(&self) -> String {
        sh(&self.client, VM, "ip -4 route show default | cut -d' ' -f3")
    }

    /// Copies a file to `/root` of the guest.
    fn upload(&self, file: &Path) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let path = format!("/root/{name}").parse().unwrap();
        let content = File::open(file).unwrap();
        self.client
            .write_file(VM, &path, &Upload::default(), content, None)
            .unwrap();
    }
}

/// Creates a root of busybox with a few programs.
fn busybox_in(root: &Path) {
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "echo", "ip", "ping"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
}
