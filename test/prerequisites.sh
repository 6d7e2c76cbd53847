#!/usr/bin/env bash
# What the tests need beside Go, make and a C compiler: a Java runtime and Maven for the real Apache Kafka, libfaketime to set
# the clock of a database, and for root an unprivileged user that PostgreSQL can run as. Installs what is missing where it may (apt-get as root or by sudo without a
# password), else says what to install. Does nothing when all is there. PostgreSQL itself is fetched by the tests.
set -euo pipefail

oldest_java=17

java_is_new_enough() {
  local java=java version
  if [ -n "${JAVA_HOME:-}" ]; then java=$JAVA_HOME/bin/java; fi
  command -v "$java" >/dev/null || return 1
  # openjdk version "17.0.15" 2025-04-15; before 9 it was "1.8.0"
  version=$("$java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1)
  [ "${version:-0}" -ge "$oldest_java" ]
}

# Where test/robustness looks for it.
has_faketime() { compgen -G '/usr/lib*/*/faketime/libfaketime.so.1' >/dev/null; }

has_user() { getent passwd "$1" >/dev/null; }

missing=()
java_is_new_enough || missing+=(java)
command -v mvn >/dev/null || missing+=(mvn)
command -v openssl >/dev/null || missing+=(openssl)
has_faketime || missing+=(libfaketime)
if [ "$(id -u)" = 0 ] && ! has_user postgres && ! has_user nobody; then
  echo "prerequisites: adding the user postgres, because PostgreSQL does not run as root"
  useradd --system --no-create-home --shell /usr/sbin/nologin postgres
fi
if [ ${#missing[@]} = 0 ]; then exit 0; fi

as_root=()
if [ "$(id -u)" != 0 ]; then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then as_root=(sudo); else as_root=(refuse); fi
fi
if [ "${as_root[*]:-}" = refuse ] || ! command -v apt-get >/dev/null; then
  {
    echo "prerequisites: missing: ${missing[*]}. The tests make certificates with openssl and run a real Apache Kafka, which needs"
    echo "  - a Java runtime, version $oldest_java or newer, as java in PATH or in JAVA_HOME"
    echo "  - Maven, as mvn in PATH, to fetch Kafka from Maven Central once"
    echo "  - libfaketime, to set the clocks of databases"
    echo "On Debian and Ubuntu: sudo apt-get install default-jre-headless maven openssl libfaketime"
  } >&2
  exit 1
fi

# The default Java of an older release may be too old for Kafka: then the first of the named ones that exists.
java_package() {
  local package version
  version=$(apt-cache depends default-jre-headless 2>/dev/null | sed -n 's/.*Depends: openjdk-\([0-9]*\)-jre-headless.*/\1/p' | head -n 1)
  if [ "${version:-0}" -ge "$oldest_java" ]; then echo default-jre-headless; return; fi
  for package in openjdk-21-jre-headless openjdk-17-jre-headless; do
    if apt-cache show "$package" >/dev/null 2>&1; then echo "$package"; return; fi
  done
  echo "prerequisites: no package of a Java runtime $oldest_java or newer in the package lists" >&2
  return 1
}

echo "prerequisites: installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
packages=()
for what in "${missing[@]}"; do
  case $what in
    java) packages+=("$(java_package)") ;;
    mvn) packages+=(maven) ;;
    openssl | libfaketime) packages+=("$what") ;;
  esac
done
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"
java_is_new_enough || { echo "prerequisites: java is still older than $oldest_java: see JAVA_HOME and PATH" >&2; exit 1; }
has_faketime || { echo "prerequisites: the package libfaketime has no /usr/lib*/*/faketime/libfaketime.so.1" >&2; exit 1; }
