#!/usr/bin/env bash
# Makes this Debian or Ubuntu server a Scalebox host: packages, programs, pool, template, token, service. Run again, it brings the
# programs up to date and leaves the rest as it is.
#
#   sudo scripts/install.sh
#   sudo STORAGE_SIZE=100G scripts/install.sh        a pool of 100 GiB rather than 80 % of what is free
#   sudo BIN_DIR=/path scripts/install.sh            programs that are built already, rather than building them here
#   sudo SCALEBOX_CACHE=/path scripts/install.sh     the finished template from this folder, if it is there; else it is kept there
#
# Settings in the environment (see the table in the README) are written to a new /etc/scaleboxd/config.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

readonly config_dir=/etc/scaleboxd config=/etc/scaleboxd/config units=/etc/systemd/system
readonly settings=(
	STORAGE_SIZE POOL_AUTO_GROW POOL_LOW_WATER_GIB DEFAULT_DISK_SIZE_GIB MAX_DISK_SIZE_GIB STORAGE_BUFFER_GIB OVERCOMMIT_RATIO ACCOUNTING_SECONDS DATA_DIR POOL_IMAGE POOL_DEVICE STATE_DIR RUN_DIR
	FSTAB API_BIND API_PORT HOST_IP BRIDGE SUBNET PORT_MIN PORT_MAX GUEST_DNS GUEST_DENY VMM ACCEL DEFAULT_VCPU_COUNT DEFAULT_MEM_SIZE_MIB
	GUEST_TRIM_INTERVAL_MINUTES LOG_FORMAT LOG_LEVEL
)

say() { printf '== %s\n' "$*"; }
die() {
	printf 'install.sh: %s\n' "$*" >&2
	exit 1
}

require_host() {
	[[ $EUID -eq 0 ]] || die "run it as root: sudo scripts/install.sh"
	[[ $(uname -m) == x86_64 ]] || die "Scalebox runs on x86_64, this is $(uname -m)"
	command -v apt-get >/dev/null || die "this script knows Debian and Ubuntu; see docs/install.md for what to do elsewhere"
}

# What the configuration says, or what a new one will.
setting() {
	if [[ -e $config ]]; then
		sed -n "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*//p" "$config" | sed 's/[[:space:]]*$//; s/^"\(.*\)"$/\1/; s/^\x27\(.*\)\x27$/\1/' | tail -n 1
	else
		printf '%s\n' "${!1:-}"
	fi
}

# The programs that are run here take settings from the environment, the service takes them from the configuration: both must be the same.
check_settings() {
	local key dir
	for key in API_TOKEN "${settings[@]}"; do
		[[ -n ${!key:-} && -e $config ]] || continue
		[[ ${!key} == "$(setting "$key")" ]] ||
			die "$key is in the environment, and $config says otherwise: change it there, or unset it"
	done
	for key in DATA_DIR POOL_IMAGE STATE_DIR RUN_DIR; do
		dir=$(setting "$key")
		case $dir/ in
			/home/* | /root/* | /tmp/* | /var/tmp/* | /run/user/*)
				die "$key is $dir: the service does not see /home, /root, /run/user and the host's /tmp; choose another place, such as /srv"
				;;
		esac
	done
}

# Before anything is changed: the programs are there, or can be built.
require_programs() {
	local program
	if [[ -z ${BIN_DIR:-} ]]; then
		scripts/toolchain.sh check || die "nothing was changed"
		return
	fi
	for program in scaleboxd scalebox; do
		[[ -x $BIN_DIR/$program ]] || die "$BIN_DIR/$program is not there"
	done
}

install_packages() {
	say "Install packages"
	local groups=(run)
	[[ -n ${BIN_DIR:-} ]] || groups+=(build)
	scripts/deps.sh "${groups[@]}"
}

install_programs() {
	local from=${BIN_DIR:-} program
	if [[ -z $from ]]; then
		say "Build the programs"
		# As the person who called: what is built is theirs.
		scripts/toolchain.sh run cargo build --locked --release --bin scaleboxd --bin scalebox
		from=target/release
	fi
	for program in scaleboxd scalebox; do
		# Beside and renamed: a program that runs is replaced for its next start.
		install -m 0755 "$from/$program" "/usr/local/bin/.$program.new"
		mv -f "/usr/local/bin/.$program.new" "/usr/local/bin/$program"
	done
	install -d /usr/share/bash-completion/completions
	/usr/local/bin/scalebox completions bash >/usr/share/bash-completion/completions/scalebox
}

# A new token is in $token; empty when there was a configuration already.
token=
write_config() {
	install -d -m 0700 "$config_dir"
	if [[ -e $config ]]; then
		say "Keeping $config"
		chmod 0600 "$config"
		return
	fi
	say "Write $config"
	token=${API_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
	local new key
	new=$(mktemp "$config_dir/.config.XXXXXX")
	chmod 0600 "$new"
	{
		echo "# Scalebox's settings; the README lists them all. Restart scaleboxd after a change."
		echo "API_TOKEN=$token"
		for key in "${settings[@]}"; do
			[[ -z ${!key:-} ]] || echo "$key=${!key}"
		done
	} >"$new"
	mv "$new" "$config"
}

# Guests reach the network through this host. Set before Docker starts: where Docker has to turn forwarding on itself, it drops what is
# not its own.
allow_forwarding() {
	echo "net.ipv4.ip_forward = 1" >/etc/sysctl.d/60-scalebox.conf
	sysctl -q -p /etc/sysctl.d/60-scalebox.conf
}

# Puts a unit in place, with the pool's mount point in it, wherever that is.
install_unit() {
	local name=$1 data_dir mount
	data_dir=$(setting DATA_DIR)
	data_dir=${data_dir:-/var/lib/scalebox}
	mount=$(systemd-escape --path --suffix=mount "$data_dir")
	# Backslashes, as sed reads them.
	sed "s#var-lib-scalebox\.mount#${mount//\\/\\\\}#" "packaging/$name" >"$units/$name.new"
	chmod 0644 "$units/$name.new"
	mv "$units/$name.new" "$units/$name"
}

# Pauses that grow between failed starts, where systemd knows them.
install_pauses() {
	local version
	version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
	((version >= 254)) || return 0
	install -d "$units/scaleboxd.service.d"
	install -m 0644 packaging/restart.conf "$units/scaleboxd.service.d/restart.conf"
}

install_service() {
	say "Install the service"
	install -d "$units"
	install_unit scaleboxd.service
	install_unit scalebox-guests.service
	if [[ ! -d /run/systemd/system ]]; then
		echo "systemd does not run here; start the daemon with: scaleboxd serve"
		return
	fi
	install_pauses
	systemctl daemon-reload
	# Never restarted: its end is the end of the guests.
	systemctl enable --quiet --now scalebox-guests
	systemctl enable --quiet scaleboxd
	# Machines run on through a restart of the daemon. It has started when it answers.
	systemctl restart scaleboxd || failed_start
	wait_for_health || failed_start
}

# As root without settings of its own, whose client asks the daemon of this host.
wait_for_health() {
	local tries
	for ((tries = 0; tries < 50; tries++)); do
		if env -u SCALEBOX_URL -u SCALEBOX_TOKEN XDG_CONFIG_HOME=/nonexistent /usr/local/bin/scalebox status >/dev/null 2>&1; then
			return
		fi
		sleep 0.2
	done
	return 1
}

failed_start() {
	journalctl --unit scaleboxd --identifier scaleboxd --no-pager --lines 5 --output cat >&2 || true
	die "the daemon does not start; ask: scaleboxd doctor. Correct $config and run: systemctl restart scaleboxd"
}

require_host
check_settings
require_programs
install_packages
install_programs
write_config
allow_forwarding
say "Create the pool"
/usr/local/bin/scaleboxd pool init
say "Build the Debian template"
/usr/local/bin/scaleboxd template build debian-base ${SCALEBOX_CACHE:+--cache "$SCALEBOX_CACHE"}
install_service

say "Scalebox is installed"
cat <<TXT

A user of this host is logged in by:

  (umask 077; mkdir -p ~/.config/scalebox; sudo scaleboxd client-config >~/.config/scalebox/config)

TXT
if [[ -n $token ]]; then
	cat <<TXT
The API's token, shown this once (it stands in $config, for root alone):

  export SCALEBOX_TOKEN=$token

TXT
fi
echo "Next: scalebox status, then: scalebox vm create --wait"
