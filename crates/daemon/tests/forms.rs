//! Checks that all later code accepts every value that the API's parser accepts. Nothing is
//! started.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

use proptest::prelude::*;
use scalebox_api::{CreateVm, IdempotencyKey, Limits, UpdateVm, VmName};
use scalebox_net::mac_from_ip;
use scalebox_units::{Gib, Mac, VmId};
use std::net::Ipv4Addr;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8x1Y3qTqV2yqT7m3U0nVq0Z9m2hJb5p0nS9QmVb1cD";
/// The maximum limits that the settings allow.
const LIMITS: Limits = Limits {
    max_disk_size_gib: 65_536,
    max_vcpus: 288,
    min_mem_mib: 128,
    max_mem_mib: 1 << 24,
};

/// Generates texts similar to names and ids, and arbitrary ones.
fn texts() -> impl Strategy<Value = String> {
    prop_oneof![
        "[A-Za-z0-9._-]{0,66}",
        "vm-[0-9a-f]{11,13}",
        "vm-[0-9a-fA-F]{12}\n?",
        "\\PC{0,8}",
        ".{0,8}"
    ]
}

#[test]
fn every_generated_name_is_a_valid_vm_name() {
    let words = petname::Petnames::default();
    let longest = |list: &[&str]| list.iter().map(|word| word.len()).max().unwrap_or(0);
    for word in words
        .adverbs
        .iter()
        .chain(words.adjectives.iter())
        .chain(words.nouns.iter())
    {
        assert!(word.parse::<VmName>().is_ok(), "{word:?}");
    }
    assert!(longest(&words.adverbs) + longest(&words.adjectives) + longest(&words.nouns) + 2 <= 63);
}

proptest! {
    #[test]
    fn a_vm_name_never_looks_like_an_id(text in texts()) {
        prop_assert!(text.parse::<VmId>().is_err() || text.parse::<VmName>().is_err(), "{:?}", text);
    }

    #[test]
    fn every_guest_has_a_unicast_mac_address(ip in any::<u32>()) {
        let mac = mac_from_ip(Ipv4Addr::from(ip));
        prop_assert!(mac.is_unicast());
        prop_assert_eq!(mac.to_string().parse::<Mac>().unwrap(), mac);
    }

    #[test]
    fn an_idempotency_key_is_the_same_after_a_round_trip(text in "[!-~]{0,260}|\"?[a-z0-9-]{1,9}\"?|.{0,6}") {
        if let Ok(key) = text.parse::<IdempotencyKey>() {
            prop_assert!((1..=255).contains(&key.as_str().len()));
            prop_assert_eq!(&format!("\"{key}\"").parse::<IdempotencyKey>().unwrap(), &key);
            prop_assert_eq!(&key.as_str().parse::<IdempotencyKey>().unwrap(), &key);
        }
    }

    #[test]
    fn every_accepted_number_fits_where_it_is_used(numbers in prop::array::uniform6(prop_oneof![
        0u64..5, 99_990u64..100_010, 999_990u64..1_000_010, 65_530u64..65_540, any::<u64>(),
    ])) {
        let [disk, vcpus, memory, iops, disk_mbps, net_mbps] = numbers;
        let body = format!(
            r#"{{"template": "t", "ssh_public_key": "{KEY}", "disk_size_gib": {disk}, "vcpu_count": {vcpus},
                "mem_size_mib": {memory}, "disk_iops": {iops}, "disk_mbps": {disk_mbps}, "net_mbps": {net_mbps}}}"#
        );
        if let Ok(request) = CreateVm::parse(body.as_bytes(), &LIMITS) {
            let size = Gib::new(request.disk_size_gib.unwrap()).bytes().as_u64();
            prop_assert_eq!(size, disk * (1 << 30), "no size overflows");
            prop_assert!(i64::try_from(size).is_ok(), "files are no larger");
            prop_assert!(u32::try_from(request.disk_iops.unwrap()).is_ok());
            prop_assert!(u32::try_from(request.net_mbps.unwrap()).is_ok());
            // The limit of QEMU's throttle groups.
            prop_assert!(request.disk_mbps.unwrap() * 1_000_000 <= 1_000_000_000_000_000);
        }
        let change = format!(r#"{{"disk_size_gib": {disk}}}"#);
        let created = format!(r#"{{"template": "t", "ssh_public_key": "{KEY}", "disk_size_gib": {disk}}}"#);
        prop_assert_eq!(
            UpdateVm::parse(change.as_bytes(), &LIMITS).is_ok(),
            CreateVm::parse(created.as_bytes(), &LIMITS).is_ok()
        );
    }
}
