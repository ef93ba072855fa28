# shellcheck shell=bash
# Sourced by the demo and the benchmark: runs a container registry on loopback.
#
#   registry_up FOLDER [anonymous]
#                         starts it, with its files in FOLDER; sets REGISTRY (host and port) and
#                         REGISTRY_PID. It demands a password, REGISTRY_PASSWORD of REGISTRY_USER,
#                         unless it is anonymous
#   registry_image NAME   makes an image of busybox and pushes it as NAME
#   registry_down         stops it

registry_up() {
	local folder=$1 access=${2:-password} tries
	registry_folder=$folder
	mkdir -p -- "$folder"
	REGISTRY=127.0.0.1:$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
	cat >"$folder/config.yml" <<-YML
		version: 0.1
		log: {accesslog: {disabled: true}, level: error}
		storage: {filesystem: {rootdirectory: $folder/data}}
		http: {addr: '$REGISTRY'}
	YML
	[[ $access == anonymous ]] || registry_password
	docker-registry serve "$folder/config.yml" >"$folder/log" 2>&1 &
	REGISTRY_PID=$!
	for ((tries = 0; tries < 300; tries++)); do
		(: <"/dev/tcp/${REGISTRY%:*}/${REGISTRY#*:}") 2>/dev/null && return
		kill -0 "$REGISTRY_PID" 2>/dev/null || break
		sleep 0.1
	done
	echo "registry.sh: the registry did not start; its log:" >&2
	cat "$folder/log" >&2
	return 1
}

# registry_password: makes the password, and adds it to the configuration.
registry_password() {
	local folder=$registry_folder hash
	REGISTRY_USER=demo
	REGISTRY_PASSWORD=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
	hash=$(PASSWORD=$REGISTRY_PASSWORD python3 -W ignore -c \
		'import crypt, os; print(crypt.crypt(os.environ["PASSWORD"], crypt.mksalt(crypt.METHOD_BLOWFISH)))')
	(umask 077 && printf '%s:%s\n' "$REGISTRY_USER" "$hash" >"$folder/htpasswd")
	echo "auth: {htpasswd: {realm: demo, path: $folder/htpasswd}}" >>"$folder/config.yml"
}

registry_image() {
	local name=$1 image=$registry_folder/image bundle=$registry_folder/bundle applet
	umoci init --layout "$image"
	umoci new --image "$image:1"
	umoci unpack --image "$image:1" "$bundle"
	mkdir -p "$bundle/rootfs/bin"
	cp /bin/busybox "$bundle/rootfs/bin/"
	for applet in sh cat echo uname; do
		ln -s busybox "$bundle/rootfs/bin/$applet"
	done
	umoci repack --image "$image:1" "$bundle"
	skopeo copy --quiet --dest-tls-verify=false --dest-creds "$REGISTRY_USER:$REGISTRY_PASSWORD" \
		"oci:$image:1" "docker://$REGISTRY/$name"
}

registry_down() {
	[[ -n ${REGISTRY_PID:-} ]] || return 0
	kill "$REGISTRY_PID" 2>/dev/null || true
	wait "$REGISTRY_PID" 2>/dev/null || true
	REGISTRY_PID=
}
