//! The settings in effect, for `scaleboxd settings`.

use crate::settings::error::SettingsError;
use crate::settings::given::{Given, Source};
use crate::settings::load;
use crate::settings::table::{SECRET, SETTINGS, Setting};
use crate::settings::values::Settings;
use scalebox_storage::Backing;
use serde::Serialize;
use std::path::Path;

/// One setting with the value in effect.
#[derive(Debug, Serialize)]
pub(crate) struct SettingInEffect {
    /// Name of the setting.
    pub key: &'static str,
    /// The value; `None` if there is none, if the host decides it, and for the token.
    pub value: Option<String>,
    /// The source of the value.
    pub source: Origin,
    /// The default, or a description of the value that applies otherwise.
    pub default: String,
    /// The meaning.
    pub meaning: String,
}

/// The source of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Origin {
    /// A variable of the environment.
    Environment,
    /// The configuration file.
    File,
    /// The setting is not set.
    Default,
}

/// Reads all settings, and lists them in the order of the table.
///
/// # Errors
/// As [`Settings::load`].
pub(crate) fn list(file: Option<&Path>) -> Result<Vec<SettingInEffect>, SettingsError> {
    let given = load::read(file)?;
    let settings = Settings::check(&given)?;
    Ok(in_effect(&given, &settings))
}

fn in_effect(given: &Given, settings: &Settings) -> Vec<SettingInEffect> {
    let row = |setting: &Setting| SettingInEffect {
        key: setting.key,
        value: value(setting, given, settings),
        source: match given.source(setting.key) {
            Some(Source::Environment) => Origin::Environment,
            Some(Source::File) => Origin::File,
            None => Origin::Default,
        },
        default: without_backticks(setting.default.text()),
        meaning: without_backticks(setting.meaning),
    };
    SETTINGS.iter().map(row).collect()
}

fn value(setting: &Setting, given: &Given, settings: &Settings) -> Option<String> {
    let is_set = given.get(setting.key).is_some();
    let value = match setting.key {
        SECRET => None,
        "POOL_AUTO_GROW" if !is_set => Some(if settings.pool_auto_grow { "on" } else { "off" }),
        // A device takes the place of the image.
        "POOL_IMAGE" if matches!(settings.backing, Backing::Device(_)) => None,
        key => given.get_or_default(key),
    };
    value.map(str::to_owned)
}

fn without_backticks(text: &str) -> String {
    text.replace('`', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(pairs: &[(&'static str, &str)]) -> Vec<SettingInEffect> {
        let mut given = Given::default();
        for (key, value) in pairs {
            given.set(key, (*value).to_owned(), Source::File);
        }
        in_effect(&given, &Settings::parse(&given).unwrap())
    }

    fn value<'l>(listed: &'l [SettingInEffect], key: &str) -> (Option<&'l str>, Origin) {
        let setting = listed.iter().find(|setting| setting.key == key).unwrap();
        (setting.value.as_deref(), setting.source)
    }

    #[test]
    fn every_setting_has_its_value_its_source_and_its_default() {
        let settings = listed(&[("STORAGE_SIZE", "30G"), ("POOL_DEVICE", "/dev/sdb")]);
        assert_eq!(settings.len(), SETTINGS.len());
        assert_eq!(value(&settings, "STORAGE_SIZE"), (Some("30G"), Origin::File));
        assert_eq!(value(&settings, "POOL_AUTO_GROW"), (Some("off"), Origin::Default));
        assert_eq!(value(&settings, "POOL_IMAGE"), (None, Origin::Default));
        assert_eq!(value(&settings, "API_PORT"), (Some("8080"), Origin::Default));
        assert_eq!(value(&settings, "HOST_IP"), (None, Origin::Default));
        let json = serde_json::to_string(&settings).unwrap();
        assert!(!json.contains('`'), "{json}");
    }

    #[test]
    fn the_token_is_not_listed() {
        let settings = listed(&[(SECRET, "hunter2hunter2")]);
        assert_eq!(value(&settings, SECRET), (None, Origin::File));
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}
