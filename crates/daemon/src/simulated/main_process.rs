//! The settings of images: the main process of a VM, and the defaults of its commands.

use crate::host::error::ServiceError;
use crate::simulated::http::{call, post};
use crate::simulated::sim::{Sim, id};
use crate::state::Record;
use crate::vm::main_process;
use axum::http::StatusCode;
use scalebox_api::{ImageConfig, Init, RestartPolicy};
use scalebox_storage::ConvertedImage;
use scalebox_testkit::SimAgent;
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// Creates a host with the template `web`, of an image with all settings.
fn sim() -> Sim {
    let sim = Sim::in_real_time();
    sim.vmm.set_guest(|guest| guest.agent = SimAgent::Real);
    add(&sim, "web", settings(), Init::Agent);
    sim
}

fn settings() -> ImageConfig {
    let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
    ImageConfig {
        env: texts(&["PATH=/usr/bin:/bin", "LANG=C", "MODE=image"]),
        entrypoint: texts(&["/entry", "--serve"]),
        cmd: texts(&["80"]),
        working_dir: Some("/usr".to_owned()),
        user: Some(rustix::process::getuid().as_raw().to_string()),
        exposed_ports: texts(&["80/tcp"]),
        stop_signal: Some("SIGQUIT".to_owned()),
    }
}

fn add(sim: &Sim, name: &str, config: ImageConfig, init: Init) {
    let path = sim.path("converted");
    fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    let image = ConvertedImage {
        path: &path,
        pulled: None,
        config: Some(config),
        init: Some(init),
        edited_files: &[],
    };
    let pool = &sim.host().pool;
    pool.import_converted(&name.parse().unwrap(), image, false).unwrap();
}

fn record(sim: &Sim, vm: &scalebox_api::Vm) -> Record {
    let records = sim.host().state.vms().unwrap();
    records.into_iter().find(|record| record.id == id(vm)).unwrap()
}

/// Creates a VM that must be refused, and returns the message.
fn refusal(sim: &Sim, fields: Value) -> String {
    let error = sim.try_create(fields).unwrap_err();
    let is_about_main = matches!(&error, ServiceError::Invalid { field: Some(field), .. } if field == "main");
    assert!(is_about_main, "{error:?}");
    assert!(sim.host().state.vms().unwrap().is_empty());
    error.to_string()
}

#[test]
fn the_main_process_is_the_command_of_the_image() {
    let mut sim = sim();
    let vm = sim
        .try_create(json!({ "template": "web", "env": { "MODE": "vm", "KEY": "secret" } }))
        .unwrap();
    let shown = vm.main.clone().unwrap();
    assert_eq!(
        (shown.argv.join(" ").as_str(), shown.restart),
        ("/entry --serve 80", RestartPolicy::OnFailure)
    );
    let body = sim.run(async |host| call(&host, "GET", "/vms", "").await.json());
    assert!(!body.to_string().contains("secret"), "{body}");
    sim.restart();
    let kept = record(&sim, &vm);
    let main = main_process::of(kept.guest.as_deref().unwrap()).unwrap();
    let variables: Vec<String> = main.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(
        variables,
        ["PATH=/usr/bin:/bin", "LANG=C", "MODE=image", "KEY=secret", "MODE=vm"],
        "later ones count"
    );
    assert_eq!((main.cwd.as_deref(), main.user), (Some("/usr"), settings().user));
    assert_eq!(main.stop_signal, Some(3));
}

#[test]
fn requests_change_the_main_process_or_leave_it_out() {
    let sim = sim();
    let main = json!({ "argv": ["sleep", "9"], "restart": "always" });
    let vm = sim.try_create(json!({ "template": "web", "main": main })).unwrap();
    let shown = vm.main.unwrap();
    assert_eq!(
        (shown.argv.join(" ").as_str(), shown.restart),
        ("sleep 9", RestartPolicy::Always)
    );
    let none = sim
        .try_create(json!({ "template": "web", "main": { "run": false } }))
        .unwrap();
    assert_eq!(none.main, None);
    // The commands of a VM without a main process have the settings nevertheless.
    assert!(record(&sim, &none).guest.is_some());
    // `run: false` is valid for every template.
    let plain = sim.try_create(json!({ "main": { "run": false } })).unwrap();
    assert_eq!((plain.main.clone(), record(&sim, &plain).guest), (None, None));
}

#[test]
fn a_vm_that_cannot_have_the_main_process_is_refused() {
    let sim = sim();
    add(&sim, "full", settings(), Init::System);
    add(&sim, "bare", ImageConfig::default(), Init::Agent);
    let with_init = refusal(&sim, json!({ "template": "full", "main": { "argv": ["true"] } }));
    assert!(with_init.contains("full has no main process"), "{with_init}");
    let without_command = refusal(&sim, json!({ "template": "bare", "main": { "restart": "always" } }));
    assert!(without_command.contains("main.argv"), "{without_command}");
    let arguments: Vec<String> = (0..3).map(|_| "x".repeat(100_000)).collect();
    let large = refusal(&sim, json!({ "template": "web", "main": { "argv": arguments } }));
    assert!(large.contains("262144"), "{large}");
    let full = sim.try_create(json!({ "template": "full" })).unwrap();
    assert_eq!(full.main, None);
    let bare = sim.try_create(json!({ "template": "bare" })).unwrap();
    assert_eq!(bare.main, None);
}

#[test]
fn commands_have_the_settings_of_the_image_and_the_vm_by_default() {
    let sim = sim();
    let fields = json!({ "name": "box", "template": "web", "env": { "MODE": "vm" } });
    sim.try_create(fields).unwrap();
    sim.wait(Duration::from_millis(50));
    sim.run(async |host| {
        let exec = async |body| post(&host, "/vms/box/exec", body).await.json();
        let command = "echo $LANG $MODE; pwd; id -u";
        let uid = rustix::process::getuid().as_raw();
        let result = exec(json!({ "command": command })).await;
        assert_eq!(result["stdout"], format!("C vm\n/usr\n{uid}\n"), "{result}");
        let own = json!({ "command": command, "env": { "MODE": "mine" }, "cwd": "/" });
        let result = exec(own).await;
        assert_eq!(result["stdout"], format!("C mine\n/\n{uid}\n"), "{result}");
        // The simulated guest has no main process.
        let main = call(&host, "GET", "/vms/box/execs/main", "").await;
        assert_eq!(main.status, StatusCode::NOT_FOUND);
    });
}

#[test]
fn a_snapshot_keeps_the_settings_of_the_image_without_those_of_the_vm() {
    let sim = sim();
    let vm = sim
        .try_create(json!({ "name": "box", "template": "web", "env": { "KEY": "secret" }, "main": { "run": false } }))
        .unwrap();
    sim.wait(Duration::from_millis(50));
    sim.run(async |host| {
        let made = post(&host, "/vms/box/snapshot", json!({ "template_name": "mine" })).await;
        assert_eq!(made.status, StatusCode::CREATED, "{:?}", made.json());
        let template = call(&host, "GET", "/templates/mine", "").await.json();
        assert_eq!(template["config"], serde_json::to_value(settings()).unwrap());
        assert_eq!(template["init"], "agent");
        assert!(!template.to_string().contains("secret"), "{template}");
    });
    let clone = sim.try_create(json!({ "template": "mine" })).unwrap();
    assert_eq!(clone.main.unwrap().argv[0], "/entry");
    assert_eq!(vm.main, None);
}
