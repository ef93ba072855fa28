//! Tests of `scaleboxd settings`: the list, and the token that is never shown.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use serde_json::{Value, json};
use std::fs;
use std::process::{Command, Output};

/// Runs `scaleboxd settings` with a configuration file and `API_PORT` in the environment.
fn settings(config: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config");
    fs::write(&file, config).unwrap();
    Command::new(env!("CARGO_BIN_EXE_scaleboxd"))
        .env_clear()
        .env("API_PORT", "9090")
        .arg("--config")
        .arg(&file)
        .arg("settings")
        .args(arguments)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

const CONFIG: &str = "API_TOKEN=hunter2hunter2\nSTORAGE_SIZE=30G\n";

#[test]
fn values_are_listed_with_their_source_and_without_the_token() {
    let listed = text(&settings(CONFIG, &["--json"]));
    assert!(!listed.contains("hunter2"), "{listed}");
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let of = |key: &str| {
        let all = listed.as_array().unwrap();
        let setting = all.iter().find(|setting| setting["key"] == key).unwrap();
        (setting["value"].clone(), setting["source"].clone())
    };
    assert_eq!(of("API_PORT"), (json!("9090"), json!("environment")));
    assert_eq!(of("STORAGE_SIZE"), (json!("30G"), json!("file")));
    assert_eq!(of("POOL_AUTO_GROW"), (json!("off"), json!("default")));
    assert_eq!(of("API_TOKEN"), (Value::Null, json!("file")));

    let table = text(&settings(CONFIG, &[]));
    assert!(!table.contains("hunter2"), "{table}");
    let line = table.lines().find(|line| line.starts_with("API_PORT")).unwrap();
    assert!(line.contains("9090") && line.contains("environment"), "{line}");
}

#[test]
fn invalid_settings_are_reported_but_names_are_listed_all_the_same() {
    let invalid = "API_PORT=many\nNO_SETTING=1\n";
    let refused = settings(invalid, &[]);
    assert!(!refused.status.success());
    let keys = text(&settings(invalid, &["--keys"]));
    assert!(
        keys.lines().count() > 30 && keys.lines().all(|key| !key.contains(' ')),
        "{keys}"
    );
    assert!(keys.lines().any(|key| key == "API_TOKEN"), "{keys}");
}
