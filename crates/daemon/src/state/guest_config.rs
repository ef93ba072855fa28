//! The settings for the commands in a guest, from the VM's template and the request for the VM.

use scalebox_api::{ImageConfig, Init, MainProcess};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The settings of a guest's commands. Empty for a VM of a disk image without settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct GuestConfig {
    /// The first process of the guest, as far as the template knows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// The settings of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageConfig>,
    /// The environment that the request for the VM adds.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The main process, if the guest has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub main: Option<MainProcess>,
}

impl GuestConfig {
    /// Returns the environment of commands: that of the image, then that of the request. Later
    /// variables replace earlier ones of the same name.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let image = self.image.iter().flat_map(|image| &image.env);
        // As in Docker, an entry without a value is none.
        let image = image.filter_map(|variable| variable.split_once('='));
        let own = self.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        image
            .chain(own)
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// Returns the working directory of commands, an absolute path; `None` for `/`.
    pub(crate) fn working_dir(&self) -> Option<String> {
        let path = self.image.as_ref()?.working_dir.as_ref()?;
        Some(match path.starts_with('/') {
            true => path.clone(),
            false => format!("/{path}"),
        })
    }

    /// Returns the user of commands; `None` for root.
    pub(crate) fn user(&self) -> Option<String> {
        self.image.as_ref()?.user.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_of_the_vm_follows_that_of_the_image() {
        let config = GuestConfig {
            image: Some(ImageConfig {
                env: ["PATH=/bin", "EMPTY=", "NOTHING", "A=b=c"].map(str::to_owned).into(),
                working_dir: Some("srv".into()),
                ..ImageConfig::default()
            }),
            env: [("A".into(), "mine".into())].into(),
            ..GuestConfig::default()
        };
        let environment = config.environment();
        let expected = [("PATH", "/bin"), ("EMPTY", ""), ("A", "b=c"), ("A", "mine")];
        assert_eq!(
            environment,
            expected.map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
        assert_eq!(config.working_dir().as_deref(), Some("/srv"));
        assert_eq!(config.user(), None);
        assert_eq!(GuestConfig::default().working_dir(), None);
    }
}
