# shellcheck shell=bash
# Sourced by scripts/test-host.sh: the cases, each a function that fails at its first command that does. The comment above one is what it promises.
# They share the server; each leaves it with a daemon that answers and without VMs, whether or not it succeeded (see run_case).

# What CI runs.
# shellcheck disable=SC2034 # read by scripts/test-host.sh
short_cases=(install reboot restart configuration)

# An ordinary user with sudo and rustup in their home installs: built as them, answering at the end, one command from being logged in.
case_install() {
	on <<-'SH'
		install -d -o ada -g ada /home/ada/.config
		# What is there before, for the case that removes everything.
		list_files >/root/files-before
		cp -a /payload/tree /home/ada/scalebox
		install -d /home/ada/.cargo/bin /home/ada/.rustup
		install -m 0755 /home/ada/scalebox/scripts/test-host/cargo /home/ada/.cargo/bin/cargo
		chown -R ada: /home/ada
	SH
	as_ada <<-'SH'
		cd ~/scalebox
		# Before anything is changed, and with the way out.
		said=$(fails sudo scripts/install.sh 2>&1)
		grep -q 'no Rust toolchain works for ada' <<<"$said"
		grep -q 'sh.rustup.rs' <<<"$said"
		echo 'version = "12"' >~/.rustup/settings.toml
		said=$(fails sudo CARGO_STAND_IN_VERSION=1.63.0 scripts/install.sh 2>&1)
		grep -q 'Rust 1.63.0 is too old' <<<"$said"
		[[ ! -e /etc/scaleboxd && ! -e /usr/local/bin/scaleboxd ]]

		sudo SCALEBOX_CACHE=/payload/cache scripts/install.sh
		[[ -z $(find target -not -user ada) ]]
		# As make 4.4 calls it, which passes the PATH of a Makefile on; and what is built by sudo make.
		[[ $(sudo env PATH="$(sudo scripts/toolchain.sh path)" scripts/toolchain.sh rustup-home) == ~/.rustup ]]
		sudo make --silent release
		[[ -z $(find target -not -user ada) ]]
		# The installer's words.
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

# The host reboots: guests shut down with it (nothing they wrote is lost, not even in a VM of three seconds) and come back with their keys.
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

# The host loses its power: what guests flushed is there, also in a VM of three seconds, and they answer with their keys.
case_power_cut() {
	on <<-'SH'
		create old
		create young
		for name in old young; do
			vm $name 'echo synced >synced; sync'
			host_key $name /root/key-$name
		done
		# What this case keeps on the server would be lost as well.
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

# A guest is killed 0, 1, 2, ... 20 s after its first SSH, as by the kernel when memory runs out: started again, it answers with the same host key.
case_early_kill() {
	on <<-'SH'
		kill_after() {
			local seconds=$1 name=early-$1
			new_vm $name
			# The first SSH is what shows the key.
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
		# One beside the other: the server has two processors.
		odd() { for seconds in $(seq 1 2 19); do kill_after $seconds; done; }
		odd &
		for seconds in $(seq 0 2 20); do kill_after $seconds; done
		wait $!
	SH
}

# `scaleboxd down` before a reboot, as its help says: the VMs that ran come back.
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
		# Without a reboot as well.
		systemctl stop scaleboxd
		scaleboxd down
		scaleboxd pool init
		systemctl start scaleboxd
		back one
		[[ $(status_of stopped) == stopped ]]
		delete_all
	SH
}

# The daemon is restarted, stopped, killed, and killed with all that belongs to its service: an SSH session lives through all of it.
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

# A wrong setting: restart says so, the service has failed and is not tried again; guests run on; corrected, it starts.
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

# Another program has the API's port: restart and installer say so; when the port is free, the daemon is there by itself.
case_port() {
	on <<-'SH'
		set_config API_PORT 22
		fails systemctl restart scaleboxd
		journalctl -u scaleboxd -p err --output cat | grep -F 'cannot listen on 127.0.0.1:22'
		said=$(fails in_tree env BIN_DIR=/payload/programs SCALEBOX_CACHE=/payload/cache scripts/install.sh 2>&1)
		grep -q 'the daemon does not start' <<<"$said"
		fails grep -q 'Scalebox is installed' <<<"$said"
		set_config API_PORT 8080
		# The next of the service's own attempts.
		eventually 60 scalebox status >/dev/null
	SH
}

# The pool is not mounted: the daemon makes no new one, says what is wrong, and is there as soon as the mount is.
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

# A host whose own nftables rules drop what they do not know: doctor's advice lets guests out.
case_firewall() {
	on <<-'SH'
		set_config GUEST_DENY none
		systemctl restart scaleboxd
		create one
		# A way out that needs no internet: the port by which this server is entered from outside.
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

# A newer release over an older one whose units were others: guests and their SSH sessions are not disturbed.
case_upgrade() {
	on <<-'SH'
		create one
		session one
		# As a release left it that knew one unit.
		systemctl disable scalebox-guests
		mv /etc/systemd/system/scalebox-guests.service /root/
		sed -i 's/^Type=notify/Type=exec/; /^RestartPreventExitStatus/d; /^TimeoutStartSec/d' /etc/systemd/system/scaleboxd.service
		systemctl daemon-reload
		systemctl restart scaleboxd
		before=$(pid_of one)
		in_tree env BIN_DIR=/payload/programs SCALEBOX_CACHE=/payload/cache scripts/install.sh
		[[ $(pid_of one) == "$before" ]]
		session_answers
		systemctl is-active scaleboxd scalebox-guests
		[[ $(systemctl show -P Type scaleboxd) == notify ]]
		delete_all
	SH
}

# On control groups of version 1 a VM is not part of the daemon's service: killing all of that does not end it.
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

# The drivers' own suite under real KVM, for QEMU and for Firecracker, with no row left out.
case_drivers() {
	on <<-'SH' | tee "$WORK/drivers"
		PATH=/payload/firecracker:$PATH /payload/tests/drivers --nocapture --test-threads 1
	SH
	note "$(grep -c ' passed$' "$WORK/drivers") rows passed"
	needs_firecracker || return 0
	fails_to_find 'not run' "$WORK/drivers"
}

# The service over Firecracker, with guests that boot.
case_firecracker() {
	needs_firecracker || return 0
	# Where the test looks for the programs: beside itself, as it was built.
	on <<-SH | tee "$WORK/firecracker"
		mkdir -p "$PWD/target"
		ln -sfn /payload/programs "$PWD/target/debug"
		systemctl stop scaleboxd
		PATH=/payload/firecracker:\$PATH SCALEBOX_CACHE=/payload/cache /payload/tests/firecracker --nocapture --test-threads 1
		systemctl start scaleboxd
	SH
	fails_to_find 'not run' "$WORK/firecracker"
	note "$(grep -E '^(POST|memory|growth|paused|power-off|stop)' "$WORK/firecracker" | paste -sd';')"
}

needs_firecracker() {
	if ! command -v firecracker >/dev/null || ! command -v jailer >/dev/null; then
		note "Firecracker NOT tried: there is no firecracker with its jailer on the PATH"
		return 1
	fi
}
fails_to_find() {
	if grep -F -- "$1" "$2"; then
		echo "there should be no \"$1\" in it" >&2
		return 1
	fi
}

# Removed by the commands of docs/install.md, nothing is left of it.
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
