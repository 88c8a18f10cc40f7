#!/bin/sh
# Install the servers that the tests start and stop themselves. Nothing that is installed here is
# left running, and a server that is already there is used as it is.
#
# Where one cannot be had, its tests are skipped with the reason; with CI=true this fails instead.
set -eu

have_postgres() {
  command -v postgres >/dev/null 2>&1 && command -v initdb >/dev/null 2>&1 && return
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
}

unavailable() {
  echo "PostgreSQL is not installed and $1" >&2
  if [ "${CI:-}" = true ]; then exit 1; fi
  echo "the tests that need it will be skipped" >&2
  exit 0
}

quietly() { # print a command's output only if it fails
  log=$(mktemp)
  if "$@" >"$log" 2>&1 </dev/null; then rm -f "$log"; return 0; fi
  cat "$log" >&2
  rm -f "$log"
  return 1
}

if have_postgres; then exit 0; fi
command -v apt-get >/dev/null 2>&1 || unavailable "there is no apt-get to install it with"
[ "$(id -u)" = 0 ] || unavailable "only root can install it (apt-get install postgresql)"

echo "Installing PostgreSQL (once) ..."
export DEBIAN_FRONTEND=noninteractive
# Debian's package would create and start a cluster of its own, which nobody here uses.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
  mkdir -p /etc/postgresql-common
  echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
fi
quietly apt-get update || unavailable "apt-get update failed"
quietly apt-get install --yes --no-install-recommends -o Dpkg::Options::=--force-confold postgresql ||
  unavailable "apt-get install postgresql failed"
have_postgres || unavailable "its package brought no server programs"
