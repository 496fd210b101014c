# A static binary in an empty image: docker build -t lameduck .
#
# rust-toolchain.toml is left out on purpose: the base image contains the toolchain.
# Without a registry, tests/compose/base-image.sh builds a stand-in for the base image.
FROM rust:1.95-alpine AS build
WORKDIR /build

# Builds the dependencies in their own layer, which is reused until Cargo.lock changes.
COPY Cargo.toml Cargo.lock build.rs ./
COPY shim shim
RUN mkdir -p src benches/compare \
 && echo 'fn main() {}' | tee src/main.rs benches/hook_latency.rs benches/instructions.rs benches/inject_coverage.rs benches/compare/main.rs >/dev/null \
 && touch src/lib.rs \
 && cargo build --release --locked

COPY src src
# Without `touch`, cargo would consider the empty program above up to date. `cargo install` finds the program for any
# target directory layout.
RUN touch src/main.rs src/lib.rs \
 && cargo install --locked --path . --root /out --target-dir target \
 && mkdir -p -m 0700 /out/run/lameduck

FROM scratch
LABEL org.opencontainers.image.title="lameduck" \
      org.opencontainers.image.description="A sidecar proxy that makes unmodified apps shut down gracefully" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build --chown=65532:65532 /out/run/lameduck /run/lameduck
COPY --from=build /out/bin/lameduck /lameduck
# With a read-only root file system, the control socket can't be in /run/lameduck, but in /dev/shm.
ENV XDG_RUNTIME_DIR=/dev/shm
USER 65532:65532
EXPOSE 4880 4881
ENTRYPOINT ["/lameduck"]
CMD ["--help"]
