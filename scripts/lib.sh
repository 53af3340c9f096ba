# Functions that the scripts share. Sourced by bash; sets ROOT, CACHE and the shell's strict modes.
# shellcheck shell=bash disable=SC2034
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Downloads and images that outlive a build directory.
CACHE=${WISP_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/wisp}
export ROOT CACHE
PATH=$PATH:/usr/sbin:/sbin

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# as_root CMD...: runs CMD as root, through sudo where we are somebody else.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo -- "$@"
  else
    die "'$*' needs root, and sudo is not installed; run it as root, then start again"
  fi
}

# missing_packages NAME...: prints those that dpkg does not have installed.
missing_packages() {
  local installed
  installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null | sed -n 's/ installed$//p') || true
  local name
  for name in "$@"; do
    grep -qxF -- "$name" <<<"$installed" || echo "$name"
  done
}

# need_packages NAME...: installs what is missing; does nothing, quickly, when nothing is.
need_packages() {
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing from Debian: ${missing[*]}"
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0
    --no-install-recommends install "${missing[@]}")
  local log
  log=$(mktemp)
  # Package lists may be absent or older than the archive: refresh them only then.
  if ! as_root "${install[@]}" >"$log" 2>&1 </dev/null; then
    say "refreshing the package lists"
    if ! { as_root apt-get -qq update && as_root "${install[@]}"; } >"$log" 2>&1 </dev/null; then
      cat "$log" >&2
      rm -f "$log"
      die "could not install: ${missing[*]} (the output of apt-get is above)"
    fi
  fi
  rm -f "$log"
}

# What building the program needs.
BUILD_PACKAGES=(g++ cmake ninja-build pkg-config libc6-dev libfmt-dev nlohmann-json3-dev liburing-dev libseccomp-dev)
# What making guest images and running the nested bed need.
BED_PACKAGES=(python3 qemu-system-x86 mmdebstrap debian-archive-keyring busybox-static lz4 e2fsprogs kmod)
# What tests, lint, fuzzing and benchmarks need on top.
DEV_PACKAGES=(ccache git googletest libgtest-dev libgmock-dev clang-19 clang-format-19 clang-tidy-19 libclang-rt-19-dev
  shellcheck acpica-tools socat strace passt iproute2 iperf3 binutils libbenchmark-dev libzydis-dev)

# configure PRESET: runs CMake once for build/PRESET; ninja keeps it up to date afterwards.
configure() {
  [ -f "$ROOT/build/$1/build.ninja" ] && return 0
  say "configuring build/$1"
  local log
  log=$(mktemp)
  if ! cmake -S "$ROOT" --preset "$1" >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log" "$ROOT/build/$1/build.ninja"
    die "CMake could not configure preset '$1' (its output is above)"
  fi
  rm -f "$log"
}

# build PRESET [TARGET...]: configures if needed, then builds; prints nothing when nothing is to do.
build() {
  local preset=$1
  shift
  configure "$preset"
  if ! ninja -C "$ROOT/build/$preset" -n "$@" 2>/dev/null | grep -q 'no work to do'; then
    say "building build/$preset${*:+ ($*)}"
  fi
  ninja -C "$ROOT/build/$preset" --quiet "$@" >&2
}

# have_target PRESET NAME: whether the configured build knows the target.
have_target() { ninja -C "$ROOT/build/$1" -t query "$2" >/dev/null 2>&1; }

elapsed() { printf '%d.%01d s' $(($1 / 1000)) $(($1 % 1000 / 100)); }
now_ms() { echo $(($(date +%s%N) / 1000000)); }

# vm_place: where guests under hardware virtualization can be run: `here`, or `bed` (scripts/nested). The same
# questions that -accel auto asks first.
vm_place() {
  if [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then echo here; else echo bed; fi
}
