# shellcheck shell=bash
# Sourced by the demo, the benchmark and the template cache: creates a Scalebox host in a scratch
# folder, next to anything else on this machine. Exports the daemon's settings.
#
#   scratch_up NAME SLOT    creates the folder, with NAME in its name; SLOT (0-9) selects bridge,
#                           subnet and ports
#   scratch_serve DAEMON    starts the daemon and waits until it is ready; sets SCALEBOX_URL and
#                           SCALEBOX_TOKEN
#   scratch_down DAEMON     stops the daemon and the machines; removes network, pool and folder

scratch_up() {
	local name=$1 slot=$2
	SCRATCH=$(mktemp -d "${TMPDIR:-/var/tmp}/scalebox-$name.XXXXXX")
	DAEMON_PID=
	export DATA_DIR=$SCRATCH/pool POOL_IMAGE=$SCRATCH/pool.img STATE_DIR=$SCRATCH/state RUN_DIR=$SCRATCH/run FSTAB=$SCRATCH/fstab
	export BRIDGE=sbscratch$slot SUBNET=172.30.$slot.0/24 PORT_MIN=$((22500 + slot * 50)) PORT_MAX=$((22549 + slot * 50))
	export API_BIND=127.0.0.1 API_PORT=0 HOST_IP=127.0.0.1
	API_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
	export API_TOKEN
}

scratch_serve() {
	local daemon=$1 log=$SCRATCH/daemon.log address='' line tries
	# The loop reads the log immediately, perhaps before the daemon's redirection creates it.
	: >>"$log"
	"$daemon" --config /dev/null serve 2>>"$log" &
	DAEMON_PID=$!
	for ((tries = 0; tries < 300; tries++)); do
		# A line without its end may still be being written: `read` skips it.
		while IFS= read -r line; do
			[[ $line != *' ready address='* ]] || address=${line##* ready address=}
		done <"$log"
		[[ -n $address ]] && break
		kill -0 "$DAEMON_PID" 2>/dev/null || break
		sleep 0.1
	done
	if [[ -z $address ]]; then
		echo "scratch.sh: the daemon did not start; its log:" >&2
		cat "$log" >&2
		return 1
	fi
	export SCALEBOX_URL=http://$address SCALEBOX_TOKEN=$API_TOKEN
}

scratch_down() {
	local daemon=$1
	if [[ -n ${DAEMON_PID:-} ]]; then
		kill "$DAEMON_PID" 2>/dev/null || true
		wait "$DAEMON_PID" 2>/dev/null || true
		DAEMON_PID=
	fi
	[[ -n ${SCRATCH:-} && -d $SCRATCH ]] || return 0
	if ! LOG_LEVEL=warn "$daemon" --config /dev/null down >/dev/null; then
		echo "scratch.sh: scaleboxd down failed; the host is left in $SCRATCH" >&2
		return 1
	fi
	rm -rf -- "$SCRATCH"
}
