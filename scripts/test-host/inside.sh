# shellcheck shell=bash
# Sourced on the server by every script of a case: short forms of an operator's commands.

readonly vm_key=/root/vm-key

# Prints the command that failed, because most checks print nothing.
set -E
trap 'echo "failed: $BASH_COMMAND" >&2' ERR
# Ends an open session, which would keep the script's own connection open.
trap '[[ -z ${SESSION_PID:-} ]] || kill "$SESSION_PID"' EXIT

# vm NAME COMMAND...: runs a command in a guest.
vm() {
	local name=$1
	shift
	ssh -n -F none -p "$(port_of "$name")" -i "$vm_key" -o BatchMode=yes -o IdentitiesOnly=yes -o LogLevel=ERROR -o ConnectTimeout=20 \
		-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null user@127.0.0.1 "$@"
}

field() { scalebox vm get "$1" --json | sed -n "s/^ *\"$2\": *\"\\{0,1\\}\\([^\",]*\\)\"\\{0,1\\},\\{0,1\\}$/\\1/p" | head -n 1; }
port_of() { field "$1" ssh_port; }
status_of() { field "$1" status; }

# create NAME ARGUMENTS...: creates a VM and waits for SSH; new_vm does not wait.
create() {
	new_vm "$@"
	scalebox vm wait "$1" --timeout 600 >/dev/null
}
new_vm() {
	local name=$1
	shift
	# Several VMs may be created at the same time.
	(
		flock 9
		[[ -e $vm_key ]] || ssh-keygen -q -t ed25519 -N '' -C vm -f "$vm_key"
	) 9>"$vm_key.lock"
	scalebox vm create debian-base --name "$name" --key "$vm_key.pub" "$@" >/dev/null
}

# back NAME: waits until the daemon has started a VM again and its guest responds to SSH.
back() {
	eventually 600 is_running "$1"
	scalebox vm wait "$1" --timeout 600 >/dev/null
}
is_running() { [[ $(status_of "$1" 2>/dev/null) == running ]]; }

# host_key NAME FILE: writes a guest's SSH host key into a file.
host_key() { eventually 600 shows_key "$@"; }
shows_key() {
	ssh-keyscan -T 20 -p "$(port_of "$1")" 127.0.0.1 2>/dev/null | cut -d' ' -f2- >"$2"
	[[ -s $2 ]]
}
has_key() {
	host_key "$1" "/root/now-$1"
	diff "$2" "/root/now-$1"
}

# pid_of NAME: prints the process id of a VM's hypervisor.
pid_of() {
	local id
	id=$(field "$1" id)
	# Without an id, every process would match.
	[[ -n $id ]] && pgrep -f -- "$id" | head -n 1
}

# eventually SECONDS COMMAND...: repeats a command until it succeeds.
eventually() {
	local deadline=$((SECONDS + $1))
	shift
	until "$@"; do
		((SECONDS < deadline)) || {
			echo "timed out waiting for: $*" >&2
			return 1
		}
		sleep 0.3
	done
}

fails() {
	if "$@"; then
		echo "the command succeeded, but should fail: $*" >&2
		return 1
	fi
}

delete_all() {
	local name
	for name in $(scalebox vm list --json | sed -n 's/^ *"name": "\(.*\)",$/\1/p'); do
		# A VM that is starting is busy.
		eventually 120 scalebox vm delete "$name" >/dev/null
	done
}

in_tree() { (cd /home/ada/scalebox && "$@"); }

set_config() {
	sed -i "/^$1=/d" /etc/scaleboxd/config
	echo "$1=$2" >>/etc/scaleboxd/config
}

# Prints the process ids of all hypervisors.
machines() { pgrep -f -- '-name guest=vm-|^/firecracker --id vm-' || true; }

# session NAME: opens an SSH session in a guest; session_answers checks that it still works.
session() {
	local port
	port=$(port_of "$1")
	coproc SESSION { exec ssh -F none -p "$port" -i "$vm_key" -o BatchMode=yes -o LogLevel=ERROR -o StrictHostKeyChecking=no \
		-o UserKnownHostsFile=/dev/null user@127.0.0.1 cat; }
	session_answers
}
session_answers() {
	local line
	echo "$RANDOM there" >&"${SESSION[1]}"
	read -r -t 30 line <&"${SESSION[0]}"
	[[ $line == *there ]]
}

# Lists all files, except those in places that a running system or this test changes.
list_files() {
	find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /payload -o -path /var/log -o -path /var/lib/systemd \
		-o -path /root -o -path /var/tmp -o -name .sudo_as_admin_successful -o -path '/home/ada/scalebox' -o -path '/home/ada/.cargo' -o -path '/home/ada/.rustup' \) -prune -o -print | sort
}
