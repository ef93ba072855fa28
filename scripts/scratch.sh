# shellcheck shell=bash
# Sourced by the demo, the benchmark and the template cache: a Scalebox host in a scratch folder of its own, beside whatever else this
# machine does. Sets the daemon's settings in the environment; scratch_down takes everything away again.
#
#   scratch_up NAME SLOT    NAME goes into the folder's name, SLOT (0-9) into the bridge, the subnet and the ports
#   scratch_serve DAEMON    starts the daemon and waits until it answers; sets SCALEBOX_URL and SCALEBOX_TOKEN
#   scratch_down DAEMON     ends the daemon and the machines, removes network, pool and folder

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
	local daemon=$1 log=$SCRATCH/daemon.log address tries
	# Looked into at once: the daemon's own redirection may come a moment later.
	: >>"$log"
	"$daemon" --config /dev/null serve 2>>"$log" &
	DAEMON_PID=$!
	for ((tries = 0; tries < 300; tries++)); do
		address=$(sed -n 's/.* ready address=//p' "$log" | tail -n 1)
		[[ -n $address ]] && break
		kill -0 "$DAEMON_PID" 2>/dev/null || break
		sleep 0.1
	done
	if [[ -z $address ]]; then
		echo "the daemon did not start:" >&2
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
		echo "could not take everything down; it is left in $SCRATCH" >&2
		return 1
	fi
	rm -rf -- "$SCRATCH"
}
