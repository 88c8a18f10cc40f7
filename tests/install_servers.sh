#!/bin/sh
# Install the servers that the tests start and stop themselves. Nothing that is installed here is
# left running, and a server that is already there is used as it is.
#
# Where one cannot be had, its tests are skipped with the reason; with CI=true this fails instead.
set -eu

have_postgresql() {
  command -v postgres >/dev/null 2>&1 && command -v initdb >/dev/null 2>&1 && return
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
}

have_pgbouncer() { # Debian puts it where only root's PATH leads
  command -v pgbouncer >/dev/null 2>&1 || [ -x /usr/sbin/pgbouncer ]
}

have_mariadb() { # the server, and what makes a folder for it with the help of a program of the client
  command -v mariadbd >/dev/null 2>&1 || [ -x /usr/sbin/mariadbd ] || return 1
  command -v mariadb-install-db >/dev/null 2>&1 && command -v my_print_defaults >/dev/null 2>&1
}

packages_of() {
  case $1 in
    mariadb) echo mariadb-server-core mariadb-client-core ;; # programs alone, without a service
    *) echo "$1" ;;
  esac
}

unavailable() {
  echo "these servers are not installed:$missing; $1" >&2
  if [ "${CI:-}" = true ]; then exit 1; fi
  echo "the tests that need them will be skipped" >&2
  exit 0
}

quietly() { # print a command's output only if it fails
  log=$(mktemp)
  if "$@" >"$log" 2>&1 </dev/null; then rm -f "$log"; return 0; fi
  cat "$log" >&2
  rm -f "$log"
  return 1
}

find_missing() {
  missing=
  for server in postgresql pgbouncer mariadb; do
    "have_$server" || missing="$missing $server"
  done
}

find_missing
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null 2>&1 || unavailable "there is no apt-get to install them with"
wanted=
for server in $missing; do wanted="$wanted $(packages_of "$server")"; done
[ "$(id -u)" = 0 ] || unavailable "only root can install them (apt-get install$wanted)"

echo "Installing$missing (once) ..."
export DEBIAN_FRONTEND=noninteractive
# Two of Debian's packages would start servers of their own, which nobody here uses: a cluster, which
# can be left out, and a pooler, which can be kept from starting.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
  mkdir -p /etc/postgresql-common
  echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
fi
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 1' HUP INT TERM
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
quietly apt-get update || unavailable "apt-get update failed"
# One by one: what cannot be had keeps nobody from what can.
for server in $missing; do
  # shellcheck disable=SC2046 # one word for each package
  quietly apt-get install --yes --no-install-recommends -o Dpkg::Options::=--force-confold \
    $(packages_of "$server") || continue
  if [ "$server" = pgbouncer ]; then
    quietly update-rc.d pgbouncer disable || true # nor shall it start with the machine
  fi
done
find_missing
[ -z "$missing" ] || unavailable "apt-get install failed, or brought no server programs"
