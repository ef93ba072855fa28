#!/usr/bin/env bash
# Turns this Debian or Ubuntu server into a Scalebox host: packages, programs, pool, template,
# token, services. Run again, it updates the programs and keeps everything else.
#
#   sudo scripts/install.sh
#   sudo STORAGE_SIZE=100G scripts/install.sh      sets the pool size (80 % of the free space)
#   sudo BIN_DIR=/path scripts/install.sh          installs programs that are already built
#   sudo SCALEBOX_CACHE=/path scripts/install.sh   reads the template from there, or saves it there
#
# Settings in the environment (see the README) are written to a new /etc/scaleboxd/config.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

readonly config_dir=/etc/scaleboxd config=/etc/scaleboxd/config units=/etc/systemd/system
# The programs to install.
readonly programs=${BIN_DIR:-target/release}

heading() { printf '== %s\n' "$*"; }
die() {
	printf 'install.sh: %s\n' "$*" >&2
	exit 1
}

require_host() {
	[[ $EUID -eq 0 ]] || die "needs root; run: sudo scripts/install.sh"
	[[ $(uname -m) == x86_64 ]] || die "Scalebox runs only on x86_64, and this machine is $(uname -m)"
	command -v apt-get >/dev/null || die "supports only Debian and Ubuntu; docs/install.md lists the steps to run by hand"
}

# Prints a setting from the configuration, or from the environment if there is no configuration yet.
setting() {
	if [[ -e $config ]]; then
		sed -n "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*//p" "$config" | sed 's/[[:space:]]*$//; s/^"\(.*\)"$/\1/; s/^\x27\(.*\)\x27$/\1/' | tail -n 1
	else
		printf '%s\n' "${!1:-}"
	fi
}

# Checks, before anything is changed, that the service can reach the folders in the settings.
check_folders() {
	local key dir
	for key in DATA_DIR POOL_IMAGE STATE_DIR RUN_DIR; do
		dir=$(setting "$key")
		case $dir/ in
			/home/* | /root/* | /tmp/* | /var/tmp/* | /run/user/*)
				die "$key is $dir, but the service cannot see /home, /root, /run/user and the host's /tmp; use another folder, such as /srv"
				;;
		esac
	done
}

# Checks, before anything is changed, that the programs exist or can be built.
require_programs() {
	local program
	if [[ -z ${BIN_DIR:-} ]]; then
		scripts/toolchain.sh check || die "nothing was changed"
		return
	fi
	for program in scaleboxd scalebox; do
		[[ -x $BIN_DIR/$program ]] || die "$BIN_DIR/$program does not exist or is not executable"
	done
}

install_packages() {
	heading "Install packages"
	local groups=(run)
	[[ -n ${BIN_DIR:-} ]] || groups+=(build)
	scripts/deps.sh "${groups[@]}"
}

build_programs() {
	[[ -z ${BIN_DIR:-} ]] || return 0
	heading "Build the programs"
	# The programs are built as the user who called sudo, so that target/ belongs to them.
	scripts/toolchain.sh run cargo build --locked --release --bin scaleboxd --bin scalebox
}

# The names of all settings.
settings=()
list_settings() {
	local keys
	keys=$("$programs/scaleboxd" settings --keys) || die "$programs/scaleboxd does not list its settings; are the programs and this script of one version?"
	mapfile -t settings <<<"$keys"
}

# This script runs programs with settings from the environment, the service reads them from the
# configuration: both must be the same.
check_settings() {
	local key
	[[ -e $config ]] || return 0
	for key in "${settings[@]}"; do
		[[ -z ${!key:-} || ${!key} == "$(setting "$key")" ]] ||
			die "$key in the environment differs from $config: change it there, or unset it"
	done
}

install_programs() {
	local program
	for program in scaleboxd scalebox; do
		# The program is renamed into place, because a running program cannot be overwritten.
		install -m 0755 "$programs/$program" "/usr/local/bin/.$program.new"
		mv -f "/usr/local/bin/.$program.new" "/usr/local/bin/$program"
	done
	install -d /usr/share/bash-completion/completions
	/usr/local/bin/scalebox completions bash >/usr/share/bash-completion/completions/scalebox
}

# The new token; empty if a configuration already exists.
token=
write_config() {
	install -d -m 0700 "$config_dir"
	if [[ -e $config ]]; then
		heading "Keeping $config"
		chmod 0600 "$config"
		return
	fi
	heading "Write $config"
	token=${API_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
	local new key
	new=$(mktemp "$config_dir/.config.XXXXXX")
	chmod 0600 "$new"
	{
		echo "# Scalebox settings; the README lists all of them. Restart scaleboxd after a change."
		echo "API_TOKEN=$token"
		for key in "${settings[@]}"; do
			[[ $key == API_TOKEN || -z ${!key:-} ]] || echo "$key=${!key}"
		done
	} >"$new"
	mv "$new" "$config"
}

# Enables IP forwarding for guests, also before Docker starts: if Docker enables forwarding itself,
# it drops packets of others.
allow_forwarding() {
	echo "net.ipv4.ip_forward = 1" >/etc/sysctl.d/60-scalebox.conf
	sysctl -q -p /etc/sysctl.d/60-scalebox.conf
}

# Installs a unit, with the mount unit of the pool's actual mount point.
install_unit() {
	local name=$1 data_dir mount
	data_dir=$(setting DATA_DIR)
	data_dir=${data_dir:-/var/lib/scalebox}
	mount=$(systemd-escape --path --suffix=mount "$data_dir")
	# Backslashes are escaped for sed.
	sed "s#var-lib-scalebox\.mount#${mount//\\/\\\\}#" "packaging/$name" >"$units/$name.new"
	chmod 0644 "$units/$name.new"
	mv "$units/$name.new" "$units/$name"
}

# Installs growing pauses between failed starts, if systemd supports them.
install_restart_pauses() {
	local version
	version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
	((version >= 254)) || return 0
	install -d "$units/scaleboxd.service.d"
	install -m 0644 packaging/restart.conf "$units/scaleboxd.service.d/restart.conf"
}

install_service() {
	heading "Install the service"
	install -d "$units"
	install_unit scaleboxd.service
	install_unit scalebox-guests.service
	if [[ ! -d /run/systemd/system ]]; then
		echo "systemd is not running; start the daemon with: scaleboxd serve"
		return
	fi
	install_restart_pauses
	systemctl daemon-reload
	# This service is never restarted, because stopping it shuts the guests down.
	systemctl enable --quiet --now scalebox-guests
	systemctl enable --quiet scaleboxd
	# Machines keep running when the daemon restarts. `restart` returns when it accepts requests.
	systemctl restart scaleboxd || failed_start
	wait_for_health || failed_start
}

# Waits until the daemon responds. Without settings of the user, scalebox takes the daemon's.
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
	die "the daemon does not start; run scaleboxd doctor, correct $config and run: systemctl restart scaleboxd"
}

require_host
check_folders
require_programs
install_packages
build_programs
list_settings
check_settings
install_programs
write_config
allow_forwarding
heading "Create the pool"
/usr/local/bin/scaleboxd pool init
# The service comes before the template: the daemon's start upgrades the pool of an earlier release.
install_service
heading "Build the Debian template"
/usr/local/bin/scaleboxd template build debian-base ${SCALEBOX_CACHE:+--cache "$SCALEBOX_CACHE"}

heading "Scalebox is installed"
cat <<TXT

To log in as a user of this host, run:

  (umask 077; mkdir -p ~/.config/scalebox; sudo scaleboxd client-config >~/.config/scalebox/config)

TXT
if [[ -n $token ]]; then
	cat <<TXT
The API token, shown only once (it is stored in $config, readable by root only):

  export SCALEBOX_TOKEN=$token

TXT
fi
echo "Next: scalebox status, then: scalebox vm create --wait"
