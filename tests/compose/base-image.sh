#!/usr/bin/env bash
# Builds the Dockerfile's base image from the files of this machine, for engines that reach no registry:
#
#   tests/compose/base-image.sh [--quick] && docker build -t lameduck .
#
# With --quick, cargo builds without optimisation: enough to see whether the image builds.
#
# The image contains this machine's Rust toolchain, the crates of Cargo.lock, a C linker and a shell, and has the name
# that the Dockerfile expects. As in the original image, cargo builds static programs (musl).
set -euo pipefail
cd "$(dirname "$0")/../.."

name=$(sed -n 's/^FROM \(.*\) AS build$/\1/p' Dockerfile)
target=x86_64-unknown-linux-musl
sysroot=$(rustc --print sysroot)
[ -d "$sysroot/lib/rustlib/$target" ] || { echo "run this first: rustup target add $target" >&2; exit 1; }

quick=
[ "${1:-}" != --quick ] || quick="CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=256"

# An existing image with the same content is kept, so that docker's cached layers on top of it stay valid.
of=$({ rustc --version; echo "$quick"; cat Cargo.lock "$0"; } | sha256sum | cut -c1-64)
if [ "$(docker image inspect -f '{{index .Config.Labels "of"}}' "$name" 2>/dev/null)" = "$of" ]; then
  echo "$name is up to date"
  exit
fi

# The build has no network, so every crate must be in cargo's cache.
cargo fetch --locked --target "$target"
cargo=${CARGO_HOME:-$HOME/.cargo}

list=$(mktemp)
trap 'rm -f "$list"' EXIT

# The C compiler (also the linker) and the shell, with their dependencies: the files that Debian's packages list.
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
