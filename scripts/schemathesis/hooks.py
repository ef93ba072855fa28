"""Adapts schemathesis to a scratch host: boots no guests, and removes created VMs and templates.

Failures are ignored in a few cases only: a job that can be read after it was cancelled; and,
recognized by the error message, a valid request that the state of the host does not allow (a disk
that would shrink) or that breaks a rule which the schema cannot state, a host without a kernel for
guests, a host with the maximum of jobs, a registry that does not exist, and a full pool, which other requests of the run cause by
shrinking it.
"""

import base64
import os
import re
import struct

import requests
import schemathesis
from hypothesis import strategies as st

URL = os.environ["SCALEBOX_URL"]
AUTHORIZATION = {"Authorization": "Bearer " + os.environ["SCALEBOX_TOKEN"]}
# The template of the scratch host. The API does not delete or replace a template of this name.
TEMPLATE = "debian-base"
# An image whose template would have that name: it is refused at once, and not pulled.
IMAGE = "localhost:1/debian-base"
# The number of VMs and templates to keep; older ones are deleted.
MAX_KEPT = 12


def ssh_string(data):
    return struct.pack(">I", len(data)) + data


def key_line(kind, *parts):
    blob = b"".join(ssh_string(part) for part in (kind.encode(), *parts))
    return kind + " " + base64.b64encode(blob).decode()


def rsa_modulus(size):
    # An odd number with its highest bit set; the leading zero byte makes it positive.
    return b"\0\xff" + size + b"\x01"


KEYS = st.one_of(
    st.binary(min_size=32, max_size=32).map(lambda key: key_line("ssh-ed25519", key)),
    st.binary(min_size=64, max_size=64).map(
        lambda point: key_line("ecdsa-sha2-nistp256", b"nistp256", b"\x04" + point)
    ),
    st.sampled_from([254, 382, 510]).flatmap(
        lambda size: st.binary(min_size=size, max_size=size).map(
            lambda n: key_line("ssh-rsa", b"\x01\x00\x01", rsa_modulus(n))
        )
    ),
)
COMMENTS = st.one_of(st.just(""), st.from_regex(r"[ \t]+[a-zA-Z0-9@. ü-]{0,40}", fullmatch=True))
ENDS = st.sampled_from(["", "\n", "\r\n", "\t", " \n\n"])
schemathesis.openapi.format("ssh-public-key", st.builds("{}{}{}".format, KEYS, COMMENTS, ENDS))


@schemathesis.hook
def before_call(context, case, kwargs):
    label = case.operation.label
    if label == "POST /vms" and isinstance(case.body, dict):
        if case.body.get("start", True) is True:
            case.body["start"] = False
            if isinstance(case.body.get("template"), str) and not case.body["template"].startswith("-"):
                case.body["template"] = TEMPLATE
        if isinstance(case.body.get("image"), str) and re.fullmatch("[!-~]{1,4096}", case.body["image"]):
            case.body["image"] = IMAGE
    # The VM is not started, so that there is no agent to wait for.
    if label == "POST /vms" and (case.query or {}).get("wait") in (None, "agent"):
        case.query = {name: value for name, value in (case.query or {}).items() if not name.startswith("wait")}
    # With follow=true the stream does not end.
    if label.endswith(("/events", "/console", "/output")) and (case.query or {}).get("follow") in (None, True, "true"):
        case.query = {**(case.query or {}), "follow": "false"}


@schemathesis.hook
def after_call(context, case, response):
    if response.status_code != 201 or case.method != "POST":
        return
    remove_old("vms", "id")
    remove_old("templates", "name")


def remove_old(kind, key):
    listed = requests.get(f"{URL}/{kind}", headers=AUTHORIZATION, timeout=60).json()[kind]
    listed.sort(key=lambda one: one["created_at"])
    for one in [one for one in listed if one[key] != TEMPLATE][:-MAX_KEPT]:
        requests.delete(f"{URL}/{kind}/{one[key]}", headers=AUTHORIZATION, timeout=60)


def is_refused_for_state(label, status, error):
    """Return whether a valid request was refused because of the host's state."""
    if label in ("PATCH /vms/{vm}", "POST /vms"):
        reasons = (
            "disks do not shrink",
            ": the template ",
            "disk_auto_extend.limit_gib must be at least the size of the disk",
            # No rules across fields, and none about the names in objects and the images of templates.
            "has no main process",
            "main.argv must",
            "env must",
        )
        return (status == 400 and any(reason in error for reason in reasons)) or (
            status == 422 and "was used for a different request" in error
        )
    if label in ("POST /pool/grow", "POST /pool/shrink"):
        return status == 400 and not error.startswith(("size_gib", "the body", "the request", "unknown"))
    # The schema does not have the grammar of image references, and no rules across fields.
    if label == "POST /templates/{name}/pull":
        fields = ("reference", "username", "password", "insecure")
        return status == 400 and (error.startswith(fields) or "is not an image reference" in error)
    if label.endswith("/attach"):
        return status == 400 and error.startswith("cannot attach without a WebSocket")
    if "/vms/{vm}/files" in label:
        return status == 400 and error.startswith(
            ("user", "mode", "path", "to ", "format", "list", "info", "parents", "recursive", "content")
        )
    if label == "POST /vms/{vm}/exec":
        return status == 400 and error.startswith(("argv", "command", "env", "open_stdin", "stdin"))
    if label == "POST /templates/{name}/import":
        return status == 400 and not error.startswith(("the template name", "invalid query", "the header"))
    return False


@schemathesis.hook
def filter_failure(context, failure, case, response):
    # A cancelled job stays in the list, with its outcome.
    if type(failure).__name__ == "UseAfterFree" and case.operation.label.endswith("/jobs/{job}"):
        return False
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return True
    if type(failure).__name__ == "RejectedPositiveData":
        return not is_refused_for_state(case.operation.label, response.status_code, error)
    if type(failure).__name__ == "ServerError":
        no_kernel = response.status_code == 503 and "has no guest kernel" in error
        full = response.status_code == 507 and error.startswith("Insufficient storage: ")
        busy = response.status_code == 503 and "jobs are already running" in error
        no_registry = response.status_code == 503 and "cannot reach localhost:1" in error
        return not (no_kernel or full or busy or no_registry)
    return True
