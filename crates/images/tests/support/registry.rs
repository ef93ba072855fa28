//! A real registry for tests: Debian's `docker-registry` with a password, on loopback, and images
//! for it that `umoci` makes.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The user of the registry, and the password.
pub(crate) const USER: &str = "user";
pub(crate) const PASSWORD: &str = "secret";
/// The password `secret` of the user `user`, hashed with bcrypt at its lowest cost.
const HTPASSWD: &str = "user:$2y$04$KxVAkfLrKlgTEWmrNbFnDuRlh9nwoEEsfzn4G1ARA3yRUInKG/Vf2\n";

pub(crate) fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {errors}");
}

/// A running registry with its files; dropping it ends it.
pub(crate) struct Registry {
    process: Child,
    folder: tempfile::TempDir,
    /// Host and port.
    pub(crate) host: String,
}

impl Registry {
    /// Starts a registry that demands the password.
    pub(crate) fn start() -> Registry {
        Registry::with(|folder| {
            let htpasswd = folder.join("htpasswd");
            fs::write(&htpasswd, HTPASSWD).unwrap();
            format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", htpasswd.display())
        })
    }

    /// Starts a registry that is open to everyone.
    #[allow(dead_code, reason = "not all tests need one")]
    pub(crate) fn open() -> Registry {
        Registry::with(|_| String::new())
    }

    fn with(access: impl FnOnce(&Path) -> String) -> Registry {
        let folder = tempfile::tempdir().unwrap();
        let host = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .to_string();
        let path = |name: &str| folder.path().join(name);
        let access = access(folder.path());
        let config = format!(
            "version: 0.1\nlog: {{accesslog: {{disabled: true}}, level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '{host}'}}\n{access}",
            path("data").display()
        );
        fs::write(path("config.yml"), config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(path("config.yml"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(path("log")).unwrap())
            .spawn()
            .unwrap();
        let registry = Registry { process, folder, host };
        let begun = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{:?}",
                fs::read_to_string(registry.path("log"))
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Copies the image of an OCI layout into the registry.
    pub(crate) fn push(&self, layout: &Layout, name: &str) {
        let target = format!("docker://{}/{name}", self.host);
        run(
            "skopeo",
            &[
                "copy",
                "-q",
                "--dest-tls-verify=false",
                "--dest-creds=user:secret",
                &layout.image(),
                &target,
            ],
        );
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// An OCI layout with one image, made by umoci.
pub(crate) struct Layout {
    folder: tempfile::TempDir,
}

impl Layout {
    pub(crate) fn new() -> Layout {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout { folder };
        run("umoci", &["init", "--layout", &layout.path("image")]);
        run("umoci", &["new", "--image", &format!("{}:1", layout.path("image"))]);
        layout
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn image(&self) -> String {
        format!("oci:{}:1", self.path("image"))
    }

    /// Adds a layer with the changes that `fill` makes in the root.
    pub(crate) fn layer(&self, fill: impl FnOnce(&Path)) {
        let (image, bundle) = (format!("{}:1", self.path("image")), self.path("bundle"));
        run("umoci", &["unpack", "--image", &image, &bundle]);
        fill(&Path::new(&bundle).join("rootfs"));
        run("umoci", &["repack", "--image", &image, &bundle]);
        fs::remove_dir_all(bundle).unwrap();
    }

    pub(crate) fn config(&self, options: &[&str]) {
        let image = format!("{}:1", self.path("image"));
        run("umoci", &[&["config", "--image", &image], options].concat());
    }
}

/// Makes an image with three layers: base, a change, and a removal.
pub(crate) fn small() -> Layout {
    let layout = Layout::new();
    layout.layer(|root| {
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        fs::write(root.join("usr/bin/tool"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(root.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::write(root.join("etc/removed"), "x").unwrap();
        fs::write(root.join("etc/changed"), "old").unwrap();
        symlink("usr/bin", root.join("bin")).unwrap();
    });
    layout.layer(|root| {
        fs::write(root.join("etc/changed"), "new").unwrap();
        fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/again")).unwrap();
        std::os::unix::fs::chown(root.join("etc/changed"), Some(1234), Some(5678)).unwrap();
    });
    layout.layer(|root| fs::remove_file(root.join("etc/removed")).unwrap());
    layout.config(&[
        "--config.cmd=/bin/tool",
        "--config.env=A=1",
        "--config.workingdir=/etc",
        "--config.user=1234",
        "--config.exposedports=80/tcp",
    ]);
    layout
}
