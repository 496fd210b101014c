# `just` lists these recipes. Each is one command that you can also run directly.

default:
    @just --list

# Run the slow app under lameduck, with curl lines to try; or `just example chat`
example name="slow":
    examples/run {{name}}

# Run all tests, with real Node processes behind real proxies
test *args:
    cargo test --locked {{args}}

fmt:
    cargo fmt

lint:
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings

# Check licences, bans and sources of the dependencies; advisories need the network
deny checks="licenses bans sources":
    cargo deny check {{checks}}

# Render manifests/install.yaml
manifests:
    kubectl kustomize manifests/overlays/default > manifests/install.yaml

# Run everything that must pass before a change is merged
ci:
    bash .ci/run

# Measure the README's figures; needs nginx, haproxy and wrk
bench *args:
    cargo bench --bench compare -- {{args}}

# Measure the time from the last byte to the hook's return
bench-hook:
    cargo bench --bench hook_latency -- --runs 100

# Build the container image
image tag="lameduck":
    docker build -t {{tag}} .
