# A static binary in an empty image: docker build -t lameduck .
#
# rust-toolchain.toml is left out of the build on purpose: the image is the toolchain.
# Where there is no registry, tests/compose/base-image.sh makes a stand-in for it.
FROM rust:1.95-alpine AS build
WORKDIR /build

# What we depend on, built once for as long as Cargo.lock stays the same.
COPY Cargo.toml Cargo.lock build.rs ./
COPY shim shim
RUN mkdir -p src benches/compare \
 && echo 'fn main() {}' | tee src/main.rs benches/hook_latency.rs benches/instructions.rs benches/compare/main.rs >/dev/null \
 && touch src/lib.rs \
 && cargo build --release --locked

COPY src src
# Else cargo takes the empty program of above for the newer one. `install` finds it wherever it was built to.
RUN touch src/main.rs src/lib.rs \
 && cargo install --locked --path . --root /out --target-dir target \
 && mkdir -p -m 0700 /out/run/lameduck

FROM scratch
LABEL org.opencontainers.image.title="lameduck" \
      org.opencontainers.image.description="A sidecar proxy that makes unmodified apps shut down gracefully" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build --chown=65532:65532 /out/run/lameduck /run/lameduck
COPY --from=build /out/bin/lameduck /lameduck
# With a read-only root /run/lameduck can't hold the control socket; /dev/shm can.
ENV XDG_RUNTIME_DIR=/dev/shm
USER 65532:65532
EXPOSE 4880 4881
ENTRYPOINT ["/lameduck"]
CMD ["--help"]
