#!/usr/bin/env bash
# Makes the image that the Dockerfile builds from out of this machine, for engines without a registry:
#
#   tests/compose/base-image.sh [--quick] && docker build -t lameduck .
#
# With --quick cargo doesn't optimise, for who only wants to see whether it builds.
#
# It holds this machine's Rust toolchain with the crates of Cargo.lock, a C linker and a shell, under the name that the
# Dockerfile asks for. As in the original, cargo builds static programs (musl).
set -euo pipefail
cd "$(dirname "$0")/../.."

name=$(sed -n 's/^FROM \(.*\) AS build$/\1/p' Dockerfile)
target=x86_64-unknown-linux-musl
sysroot=$(rustc --print sysroot)
[ -d "$sysroot/lib/rustlib/$target" ] || { echo "rustup target add $target comes first" >&2; exit 1; }

quick=
[ "${1:-}" != --quick ] || quick="CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=256"

# One that is there already and holds the same is kept, and with it what docker has built on it.
of=$({ rustc --version; echo "$quick"; cat Cargo.lock "$0"; } | sha256sum | cut -c1-64)
if [ "$(docker image inspect -f '{{index .Config.Labels "of"}}' "$name" 2>/dev/null)" = "$of" ]; then
  echo "$name is there"
  exit
fi

# A build without a network needs every crate in cargo's own cache.
cargo fetch --locked --target "$target"
cargo=${CARGO_HOME:-$HOME/.cargo}

list=$(mktemp)
trap 'rm -f "$list"' EXIT

# The C compiler, which links too, and the shell with all that they need, as Debian's packages list their files.
packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
  --no-enhances gcc libc6-dev coreutils dash | grep '^[a-z0-9]' | sort -u)
# shellcheck disable=SC2086 # a list
dpkg-query -W -f '${db:Status-Abbrev} ${binary:Package}\n' $packages 2>/dev/null | awk '$1 == "ii" {print $2}' \
  | xargs dpkg -L | grep -v '^/usr/share/\|^/var/' | sed 's,^/\(bin\|sbin\|lib\|lib64\)/,/usr/\1/,' | sort -u \
  | while read -r file; do if [ -L "$file" ] || [ -f "$file" ]; then echo "${file#/}"; fi; done >"$list"

{ printf "%s\n" bin sbin lib lib64 usr/bin/cc etc/alternatives/cc; grep -vx "bin\|sbin\|lib\|lib64" "$list"; } \
  | tar -C / -c -f - --no-recursion --files-from=- \
    --recursion --transform "s,^${sysroot#/},usr/local/rust," --transform "s,^${cargo#/}/registry,usr/local/cargo/registry," \
    --exclude='*/share/doc' --exclude='*/registry/src' "${sysroot#/}" "${cargo#/}/registry" \
  | docker import \
    --change 'ENV PATH=/usr/local/rust/bin:/usr/bin:/bin CARGO_HOME=/usr/local/cargo' \
    --change "ENV CARGO_NET_OFFLINE=true CARGO_BUILD_TARGET=$target CC_${target//-/_}=cc $quick" \
    --change "LABEL of=$of" \
    - "$name" >/dev/null
echo "made $name"
