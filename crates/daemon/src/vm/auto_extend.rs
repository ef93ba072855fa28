//! The setting by which a disk extends itself.

use crate::host::error::ServiceError;
use scalebox_api::AutoExtend;
use scalebox_units::Gib;

/// Rejects a limit below the current size of the disk.
///
/// # Errors
/// 400.
pub(crate) fn check(extend: AutoExtend, size: Gib) -> Result<(), ServiceError> {
    if extend.limit_gib < size.as_u64() {
        return Err(ServiceError::invalid_field(
            "disk_auto_extend.limit_gib",
            format!("disk_auto_extend.limit_gib must be at least the size of the disk, which is {size} GiB"),
        ));
    }
    Ok(())
}
