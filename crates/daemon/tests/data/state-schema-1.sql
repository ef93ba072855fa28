-- A state file as the first release leaves it: schema 1, two VMs.
CREATE TABLE vms (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    template TEXT NOT NULL,
    ssh_public_key TEXT NOT NULL,
    created_at TEXT NOT NULL,
    vcpu_count INTEGER NOT NULL,
    mem_size_mib INTEGER NOT NULL,
    disk_size_gib INTEGER NOT NULL,
    guest_ip TEXT NOT NULL UNIQUE,
    ssh_port INTEGER NOT NULL UNIQUE,
    status TEXT NOT NULL,
    status_reason TEXT
) STRICT;
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO vms VALUES ('vm-000000000001', 'vm-1', 'debian-base', 'ssh-ed25519 AAAA', '2026-01-02T03:04:01Z',
    1, 512, 10, '172.16.0.3', 22002, 'running', NULL);
INSERT INTO vms VALUES ('vm-000000000002', 'vm-2', 'debian-base', 'ssh-ed25519 AAAA', '2026-01-02T03:04:02Z',
    1, 512, 10, '172.16.0.4', 22003, 'failed', 'its process ended');
INSERT INTO facts VALUES ('pool_owner', '0123456789abcdef');
PRAGMA user_version = 1;
