# shellcheck shell=bash
# Sourced by scripts/test-host.sh: the cases. Each is a function that fails at its first failing
# command; the comment above it describes its checks. All cases share the server. Each leaves it
# with a running daemon and without VMs; after a failure, restore_server does that.

# The cases of CI.
# shellcheck disable=SC2034 # read by scripts/test-host.sh
short_cases=(install restart configuration)

# A user with sudo and their own rustup installs Scalebox and logs in with one command.
case_install() {
	on <<-'SH'
		install -d -o ada -g ada /home/ada/.config
		# case_uninstall compares the files with this list.
		list_files >/root/files-before
		cp -a /payload/tree /home/ada/scalebox
		install -d /home/ada/.cargo/bin /home/ada/.rustup
		install -m 0755 /home/ada/scalebox/scripts/test-host/cargo /home/ada/.cargo/bin/cargo
		chown -R ada: /home/ada
	SH
	as_ada <<-'SH'
		cd ~/scalebox
		# A missing or old toolchain is reported with the remedy, before anything is changed.
		output=$(fails sudo scripts/install.sh 2>&1)
		grep -q 'no Rust toolchain works for ada' <<<"$output"
		grep -q 'sh.rustup.rs' <<<"$output"
		echo 'version = "12"' >~/.rustup/settings.toml
		output=$(fails sudo CARGO_STAND_IN_VERSION=1.63.0 scripts/install.sh 2>&1)
		grep -q 'Rust 1.63.0 is too old' <<<"$output"
		[[ ! -e /etc/scaleboxd && ! -e /usr/local/bin/scaleboxd ]]

		sudo SCALEBOX_CACHE=/payload/cache scripts/install.sh
		[[ -z $(find target -not -user ada) ]]
		# toolchain.sh is called as by make 4.4, with the PATH of a Makefile. A build by sudo make belongs
		# to the user.
		[[ $(sudo env PATH="$(sudo scripts/toolchain.sh path)" scripts/toolchain.sh rustup-home) == ~/.rustup ]]
		sudo make --silent release
		[[ -z $(find target -not -user ada) ]]
		# The command that the installer prints.
		(umask 077; mkdir -p ~/.config/scalebox; sudo scaleboxd client-config >~/.config/scalebox/config)
		scalebox status
		sudo scalebox status
	SH
	on <<-'SH'
		systemctl is-active scaleboxd scalebox-guests
		systemctl is-enabled scaleboxd scalebox-guests
		scaleboxd doctor
	SH
}

# A reboot of the host shuts guests down without data loss, and starts them again with their keys.
case_reboot() {
	on <<-'SH'
		create old
		create off
		scalebox vm set off --autostart off >/dev/null
		create young
		for name in old young; do
			vm $name 'echo synced >synced; sync; echo unsynced >unsynced'
			host_key $name /root/key-$name
		done
	SH
	server_reboot
	on <<-'SH'
		for name in old young; do
			back $name
			[[ $(vm $name 'cat synced unsynced' | paste -sd' ') == 'synced unsynced' ]]
			has_key $name /root/key-$name
		done
		[[ $(status_of off) == stopped ]]
		journalctl -b -1 -u scalebox-guests --output cat | grep -c 'shut down with the host.*GuestShutdown' | grep -qx 3
		delete_all
	SH
}

# After a power cut of the host, guests have all flushed data and respond with their keys.
case_power_cut() {
	on <<-'SH'
		create old
		create young
		for name in old young; do
			vm $name 'echo synced >synced; sync'
			host_key $name /root/key-$name
		done
		# The power cut would lose the files of this case as well.
		sync /root/key-*
	SH
	server_cut
	server_start
	on <<-'SH'
		for name in old young; do
			back $name
			[[ $(vm $name cat synced) == synced ]]
			has_key $name /root/key-$name
		done
		delete_all
	SH
}

# A guest killed 0 to 20 s after its first SSH responds with the same host key when started again.
case_early_kill() {
	on <<-'SH'
		kill_after() {
			local seconds=$1 name=early-$1
			new_vm $name
			# Reading the key is the first SSH connection.
			host_key $name /root/key-$name
			sleep $seconds
			kill -KILL "$(pid_of $name)"
			eventually 60 is_failed $name
			scalebox vm start $name >/dev/null
			back $name
			has_key $name /root/key-$name
			[[ $(vm $name hostname) == "$name" ]]
			scalebox vm delete $name >/dev/null
			echo "ok: $seconds s"
		}
		is_failed() { [[ $(status_of $1) == failed ]]; }
		# Two at a time: while one waits, the other boots.
		odd() { for seconds in $(seq 1 2 19); do kill_after $seconds; done; }
		odd &
		for seconds in $(seq 0 2 20); do kill_after $seconds; done
		wait $!
	SH
}

# After `scaleboxd down`, VMs that were running start again, with and without a reboot.
case_down() {
	on <<-'SH'
		create one
		create stopped
		scalebox vm stop stopped >/dev/null
		systemctl stop scaleboxd
		scaleboxd down
		[[ -z $(machines) ]]
	SH
	server_reboot
	on <<-'SH'
		back one
		[[ $(status_of stopped) == stopped ]]
		# The same must hold without a reboot.
		systemctl stop scaleboxd
		scaleboxd down
		scaleboxd pool init
		systemctl start scaleboxd
		back one
		[[ $(status_of stopped) == stopped ]]
		delete_all
	SH
}

# An SSH session survives restarting, stopping and killing the daemon and its whole service.
case_restart() {
	on <<-'SH'
		create one
		session one
		for how in 'systemctl restart scaleboxd' 'systemctl stop scaleboxd' 'systemctl start scaleboxd' \
			'systemctl kill --signal KILL --kill-whom main scaleboxd' 'systemctl kill --signal KILL scaleboxd'; do
			$how
			session_answers
			echo "ok: $how"
		done
		eventually 60 scalebox status >/dev/null
		session_answers
		[[ $(status_of one) == running ]]
		delete_all
	SH
}

# An invalid setting makes the service fail without retries; guests keep running until it is fixed.
case_configuration() {
	on <<-'SH'
		create one
		session one
		echo MAX_DISK_SIZE_GIB=lots >>/etc/scaleboxd/config
		fails systemctl restart scaleboxd
		systemctl is-failed scaleboxd
		[[ $(systemctl show -P ExecMainStatus scaleboxd) == 78 ]]
		journalctl -u scaleboxd -p err --output cat | grep -F 'MAX_DISK_SIZE_GIB="lots"'
		session_answers
		sed -i '/MAX_DISK_SIZE_GIB/d' /etc/scaleboxd/config
		systemctl restart scaleboxd
		session_answers
		[[ $(status_of one) == running ]]
		delete_all
	SH
}

# Restart and installer report that the API's port is in use; once it is free, the daemon starts.
case_port() {
	on <<-'SH'
		set_config API_PORT 22
		fails systemctl restart scaleboxd
		journalctl -u scaleboxd -p err --output cat | grep -F 'cannot listen on 127.0.0.1:22'
		output=$(fails in_tree env BIN_DIR=/payload/programs SCALEBOX_CACHE=/payload/cache scripts/install.sh 2>&1)
		grep -q 'the daemon does not start' <<<"$output"
		fails grep -q 'Scalebox is installed' <<<"$output"
		set_config API_PORT 8080
		# systemd restarts the service.
		eventually 60 scalebox status >/dev/null
	SH
}

# Without the pool's mount, the daemon reports it, creates no new pool, and starts once it is back.
case_pool() {
	on <<-'SH'
		create one
		scalebox vm stop one >/dev/null
		systemctl stop scaleboxd
		umount /var/lib/scalebox
		mv /var/lib/scalebox.img /var/lib/elsewhere.img
		fails systemctl start scaleboxd
		journalctl -u scaleboxd -p err --output cat | tail -n 1
		fails scaleboxd doctor
		[[ ! -e /var/lib/scalebox.img ]]
		mv /var/lib/elsewhere.img /var/lib/scalebox.img
		mount /var/lib/scalebox
		eventually 60 scalebox status >/dev/null
		scalebox vm start one >/dev/null
		back one
		delete_all
	SH
}

# With a host firewall that drops forwarded packets, doctor's advice gives guests network access.
case_firewall() {
	on <<-'SH'
		set_config GUEST_DENY none
		systemctl restart scaleboxd
		create one
		# A connection to the outside that needs no internet: this server's SSH port on QEMU's host.
		out() { vm one "timeout 10 bash -c 'head -n 1 </dev/tcp/10.0.2.2/$OUTSIDE_PORT'" | grep -q SSH-2.0; }
		out
		nft -f - <<-NFT
			table inet filter {
				chain input { type filter hook input priority filter; policy accept; }
				chain forward { type filter hook forward priority filter; policy drop; }
			}
		NFT
		fails out
		fails scaleboxd doctor >/root/findings
		grep -o 'nft insert rule inet filter forward [io]ifname scalebox0 accept' /root/findings | sort -u >/root/advice
		[[ $(wc -l </root/advice) == 2 ]]
		bash -e /root/advice
		out
		nft delete table inet filter
		set_config GUEST_DENY private
		systemctl restart scaleboxd
		delete_all
	SH
}

# An upgrade from a release with other units does not disturb guests and their SSH sessions.
case_upgrade() {
	on <<-'SH'
		create one
		session one
		# The state that a release with a single unit left.
		systemctl disable scalebox-guests
		mv /etc/systemd/system/scalebox-guests.service /root/
		sed -i 's/^Type=notify/Type=exec/; /^RestartPreventExitStatus/d; /^TimeoutStartSec/d' /etc/systemd/system/scaleboxd.service
		systemctl daemon-reload
		systemctl restart scaleboxd
		# That unit does not wait until the daemon responds.
		eventually 60 is_running one
		before=$(pid_of one)
		in_tree env BIN_DIR=/payload/programs SCALEBOX_CACHE=/payload/cache scripts/install.sh
		[[ $(pid_of one) == "$before" ]]
		session_answers
		systemctl is-active scaleboxd scalebox-guests
		[[ $(systemctl show -P Type scaleboxd) == notify ]]
		delete_all
	SH
}

# With control groups version 1, killing the daemon's whole service does not kill VMs.
case_legacy_groups() {
	server_arguments='systemd.unified_cgroup_hierarchy=0' server_restart
	on <<-'SH'
		[[ -d /sys/fs/cgroup/memory ]]
		create one
		session one
		systemctl kill --signal KILL scaleboxd
		session_answers
		eventually 60 scalebox status >/dev/null
		fails grep -q "left-over process" <(journalctl -b -u scaleboxd --output cat)
		[[ $(status_of one) == running ]]
		delete_all
	SH
	server_restart
}

# The drivers' test suite passes with real KVM, for QEMU and for Firecracker, with no row skipped.
case_drivers() {
	on <<-'SH' | tee "$WORK/drivers"
		PATH=/payload/firecracker:/payload/tests:$PATH SCALEBOX_CACHE=/payload/cache \
			/payload/tests/drivers --nocapture --test-threads 1
	SH
	note "$(grep -c ' passed$' "$WORK/drivers") rows passed"
	needs_firecracker || return 0
	fails_to_find 'not run' "$WORK/drivers"
}

# The daemon's tests with Firecracker and booted guests pass.
case_firecracker() {
	needs_firecracker || return 0
	# The test expects the programs in the folder in which it was built.
	on <<-SH | tee "$WORK/firecracker"
		mkdir -p "$PWD/target"
		ln -sfn /payload/programs "$PWD/target/debug"
		systemctl stop scaleboxd
		outcome=0
		PATH=/payload/firecracker:\$PATH SCALEBOX_CACHE=/payload/cache /payload/tests/firecracker --nocapture --test-threads 1 || outcome=\$?
		rm "$PWD/target/debug"
		rmdir -p --ignore-fail-on-non-empty "$PWD/target"
		systemctl start scaleboxd
		exit \$outcome
	SH
	fails_to_find 'not run' "$WORK/firecracker"
	note "$(grep -E '^(POST|memory|growth|paused|power-off|stop)' "$WORK/firecracker" | paste -sd';')"
}

needs_firecracker() {
	if ! command -v firecracker >/dev/null || ! command -v jailer >/dev/null; then
		note "Firecracker NOT tested: firecracker and jailer are not on the PATH"
		return 1
	fi
}
fails_to_find() {
	if grep -F -- "$1" "$2"; then
		echo "the output contains \"$1\"" >&2
		return 1
	fi
}

# The commands in docs/install.md remove Scalebox completely.
case_uninstall() {
	on <<-'SH'
		create one
		sed -n '/^## Removing/,$p' /payload/tree/docs/install.md | sed -n '/^```sh$/,/^```$/{//!p}' >/root/remove.sh
		[[ -s /root/remove.sh ]]
		HOME=/home/ada bash -euxo pipefail /root/remove.sh
		fails grep scalebox /etc/fstab
		list_files | diff /root/files-before -
		[[ -z $(machines) && -z $(losetup --noheadings) && -z $(nft list ruleset) ]]
		fails ip link show scalebox0
		[[ $(cat /proc/sys/net/ipv4/ip_forward) == 0 ]]
		fails systemctl cat scaleboxd
		[[ -z $(find /sys/fs/cgroup -type d -name 'vm-*') ]]
	SH
}
