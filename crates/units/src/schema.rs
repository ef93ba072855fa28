//! The JSON schema of each type, for the OpenAPI document. The patterns match the texts that the
//! parsers accept.

use crate::{ExecId, ImageReference, SshPublicKey, TemplateName, VmName};
use std::borrow::Cow;
use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{KnownFormat, RefOr};
use utoipa::{PartialSchema, ToSchema};

fn text() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(SchemaType::Type(Type::String))
}

impl ToSchema for ExecId {
    fn name() -> Cow<'static, str> {
        "ExecId".into()
    }
}

impl PartialSchema for ExecId {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some("An exec's id: `exec-` and twelve lower-case hex digits."))
            .pattern(Some("^(main|exec-[0-9a-f]{12})$"))
            .examples(["exec-0123456789ab"])
            .into()
    }
}

impl ToSchema for TemplateName {
    fn name() -> Cow<'static, str> {
        "TemplateName".into()
    }
}

impl PartialSchema for TemplateName {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some(
                "A template's name: letters, digits, dashes, dots and underscores, beginning with a letter or a digit.",
            ))
            .pattern(Some("^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"))
            .max_length(Some(63))
            .examples(["debian-base"])
            .into()
    }
}

impl ToSchema for ImageReference {
    fn name() -> Cow<'static, str> {
        "ImageReference".into()
    }
}

impl PartialSchema for ImageReference {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some("An image in a registry: `[REGISTRY/]NAME[:TAG][@sha256:DIGEST]`."))
            .pattern(Some("^[!-~]{1,4096}$"))
            .max_length(Some(4096))
            .examples(["python:3.12-slim"])
            .into()
    }
}

impl ToSchema for VmName {
    fn name() -> Cow<'static, str> {
        "VmName".into()
    }
}

impl PartialSchema for VmName {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some(
                "A VM's name: a host name of lower-case letters, digits and dashes, without a dash at either end, that does \
                 not have the form of a VM's id.",
            ))
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Hostname)))
            .pattern(Some("^(?!vm-[0-9a-f]{12}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"))
            .max_length(Some(63))
            .examples(["build-7"])
            .into()
    }
}

impl ToSchema for SshPublicKey {
    fn name() -> Cow<'static, str> {
        "SshPublicKey".into()
    }
}

impl PartialSchema for SshPublicKey {
    fn schema() -> RefOr<Schema> {
        text()
            .description(Some(
                "An OpenSSH public key on one line, such as the content of `~/.ssh/id_ed25519.pub`. Surrounding white \
                 space is removed. Rejected: several keys, options before the key, certificates, DSA, RSA under 2048 \
                 or over 16384 bits, and data that is not a key of the given type.",
            ))
            .format(Some(SchemaFormat::Custom("ssh-public-key".to_owned())))
            .pattern(Some(
                "^\\s*(ssh-ed25519|ecdsa-sha2-nistp(256|384|521)|ssh-rsa|sk-ssh-ed25519@openssh\\.com|\
                 sk-ecdsa-sha2-nistp256@openssh\\.com)[ \\t]+AAAA[A-Za-z0-9+/]+={0,3}([ \\t]+[^\\r\\n]*)?\\s*$",
            ))
            .max_length(Some(8192))
            .examples(["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me@laptop"])
            .into()
    }
}
