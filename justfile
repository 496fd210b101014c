# `just` lists these; each is one command, which can be typed without just as well.

default:
    @just --list

# The slow app under lameduck, with curl lines to try; or `just example chat`
example name="slow":
    examples/run {{name}}

# All tests; real Node processes behind real proxies
test *args:
    cargo test --locked {{args}}

fmt:
    cargo fmt

lint:
    cargo fmt --check
    cargo clippy --locked --all-targets -- -D warnings

# Licences, bans and sources of what we depend on; advisories need the network
deny checks="licenses bans sources":
    cargo deny check {{checks}}

# manifests/install.yaml, rendered anew
manifests:
    kubectl kustomize manifests/overlays/default > manifests/install.yaml

# What must hold before a change goes in
ci:
    bash .ci/run

# The README's figures; needs nginx, haproxy and wrk
bench *args:
    cargo bench --bench compare -- {{args}}

# How long after the last byte the hook returns
bench-hook:
    cargo bench --bench hook_latency -- --runs 100

# The container image
image tag="lameduck":
    docker build -t {{tag}} .
