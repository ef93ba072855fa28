# shellcheck shell=bash
# Sourced by scripts/test-host.sh: runs the server, an emulated machine that offers KVM.
#
#   server_prepare       creates the disks of a run in WORK, from ROOT
#   server_start         boots the server and waits for SSH; also after server_cut
#   server_reboot        reboots the server and waits
#   server_restart       powers off and boots with the kernel arguments server_arguments
#   server_cut           kills the server, like a power cut
#   on, as_ada           runs the script on standard input on the server, as root or as the user ada
#
# Needs WORK (of this run), ROOT (from build_root), SCALEBOX_CACHE.

readonly server_memory=4096
# Timeout of a boot, in seconds. A boot takes 20 s on a quiet machine.
readonly server_timeout=300
# Timeout of a case's script, in seconds.
readonly script_timeout=3600

server_prepare() {
	mkdir -p "$WORK/payload"
	payload "$WORK/payload"
	local blocks
	blocks=$(du -s --block-size=1M "$WORK/payload" | cut -f1)
	truncate -s "$((blocks * 6 / 5 + 64))M" "$WORK/payload.img"
	mke2fs -q -t ext4 -L payload -m 0 -d "$WORK/payload" "$WORK/payload.img"
	rm -rf -- "$WORK/payload"
	cp --sparse=always "$ROOT/disk.img" "$WORK/disk.img"
	server_port=$(free_port)
}

# Collects the server's second disk: files tracked by git, programs, template, test binaries, keys.
payload() {
	local to=$1 fingerprint program found
	ssh-keygen -q -t ed25519 -N '' -C test-host -f "$WORK/key"
	install -m 0644 "$WORK/key.pub" "$to/authorized_keys"
	install -m 0644 scripts/test-host/inside.sh "$to/"
	mkdir "$to/tree" "$to/programs" "$to/cache" "$to/tests" "$to/firecracker"
	git ls-files -z | xargs -0 cp --parents --no-dereference --preserve=mode -t "$to/tree"
	for program in scaleboxd scalebox; do
		strip -o "$to/programs/$program" "target/debug/$program"
	done
	# The most recently used entry of the cache.
	fingerprint=$(find "$SCALEBOX_CACHE" -maxdepth 1 -name '*.lock' -printf '%T@ %f\n' | sort -n | tail -n 1 | cut -d' ' -f2)
	cp -a --sparse=always "$SCALEBOX_CACHE/${fingerprint%.lock}" "$to/cache/"
	for program in firecracker jailer; do
		if found=$(command -v "$program"); then
			install "$found" "$to/firecracker/$program"
		fi
	done
	test_binaries "$to/tests"
	chmod -R go+rX "$to"
}

# Copies the tests that need KVM or Firecracker, from the build that all tests share, and busybox
# for the roots of their guests.
test_binaries() {
	local to=$1 test output
	output=$(cargo test --locked --no-run --workspace --features scaleboxd/fault-points --test drivers --test firecracker 2>&1) || {
		echo "$output" >&2
		return 1
	}
	for test in drivers firecracker; do
		strip -o "$to/$test" "$(sed -n "s/.*Executable tests\/$test.rs (\(.*\))$/\1/p" <<<"$output")"
	done
	cp /bin/busybox "$to/busybox"
}

free_port() {
	local port
	while :; do
		port=$((20000 + RANDOM % 10000))
		ss -Hltn "sport = :$port" | grep -q . || break
	done
	echo "$port"
}

# The server has one processor: with two, the emulation of SVM (QEMU 7.2) let the server's kernel
# panic or hang under load. It has no page tables of five levels, which emulation walks more slowly.
server_start() {
	nice -n 5 qemu-system-x86_64 -daemonize -pidfile "$WORK/qemu.pid" -display none \
		-accel tcg,thread=multi,tb-size=512 -cpu max,-la57 -M q35 -smp 1 -m "$server_memory" \
		-kernel "$ROOT/vmlinuz" -initrd "$ROOT/initrd.img" \
		-append "root=/dev/vda rw console=ttyS0 net.ifnames=0 tsc=reliable ${server_arguments:-}" \
		-drive "file=$WORK/disk.img,if=virtio,format=raw,discard=unmap,cache=unsafe" \
		-drive "file=$WORK/payload.img,if=virtio,format=raw,cache=unsafe" \
		-netdev "user,id=n0,hostfwd=tcp:127.0.0.1:$server_port-:22" -device virtio-net-pci,netdev=n0 -device virtio-rng-pci \
		-serial "file:$WORK/console" -monitor none
	server_wait ''
}

# Prints the process id from the pid file, because cases run in subshells.
server_pid() { cat "$WORK/qemu.pid" 2>/dev/null; }
server_runs() {
	local pid
	pid=$(server_pid) || return 1
	# All threads have ended when only a zombie leader is left: then the port is free.
	[[ -d /proc/$pid/task/$pid ]] || return 1
	[[ $(find "/proc/$pid/task" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l) -gt 1 || $(sed -n 's/^State:\t//p' "/proc/$pid/status" 2>/dev/null) != Z* ]]
}

# server_broke: whether the server's own kernel has panicked or hung since its QEMU was started.
# That is a fault of the emulation, not of Scalebox.
server_broke() { grep -qE 'Kernel panic - not syncing|rcu: INFO: .* stall|soft lockup' "$WORK/console" 2>/dev/null; }

# server_answers: succeeds if SSH still works.
server_answers() { timeout 120 ssh "${ssh_options[@]}" -o ConnectTimeout=60 root@127.0.0.1 true 2>/dev/null; }

# server_wait BOOT_ID: waits until the server responds with another boot id.
server_wait() {
	local before=$1 deadline=$((SECONDS + server_timeout)) boot
	while :; do
		server_runs || {
			echo "the server's QEMU process ended" >&2
			return 1
		}
		boot=$(timeout 20 ssh "${ssh_options[@]}" root@127.0.0.1 cat /proc/sys/kernel/random/boot_id 2>/dev/null) || boot=
		[[ -z $boot || $boot == "$before" ]] || return 0
		if ((SECONDS >= deadline)); then
			tail -n 40 "$WORK/console" >&2
			echo "the server did not respond to SSH within $server_timeout s" >&2
			return 1
		fi
		sleep 0.5
	done
}

server_reboot() {
	local before
	before=$(on <<<'cat /proc/sys/kernel/random/boot_id')
	# The connection may close before the command returns.
	on <<<'systemctl --no-block reboot' || true
	server_wait "$before"
}

# Boots with other kernel arguments, as after a change of the boot loader's configuration.
server_restart() {
	on <<<'systemctl --no-block poweroff' || true
	local deadline=$((SECONDS + server_timeout))
	while server_runs; do
		((SECONDS < deadline)) || return 1
		sleep 0.2
	done
	server_start
}

server_cut() {
	server_runs || return 0
	kill -KILL "$(server_pid)"
	while server_runs; do sleep 0.1; done
	rm "$WORK/qemu.pid"
}

# Each connection runs one command. Host keys are not checked: each run's disk has its own.
server_ssh() {
	ssh_options=(
		-F none -p "$server_port" -i "$WORK/key" -o BatchMode=yes -o IdentitiesOnly=yes -o LogLevel=ERROR -o ConnectTimeout=10
		-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ServerAliveInterval=15 -o ServerAliveCountMax=8
	)
}

on() { on_as root; }
as_ada() { on_as ada; }
on_as() {
	local script
	script="set -euo pipefail; OUTSIDE_PORT=$server_port; source /payload/inside.sh; $(cat)"
	timeout "$script_timeout" ssh -n "${ssh_options[@]}" "$1@127.0.0.1" "bash -c $(printf %q "$script")"
}
