# What CI does, by hand: `just check`, `just test`, `just demo`.
check:
    cargo fmt --check
    cargo clippy --workspace --all-targets -- -D warnings

test:
    cargo test --workspace

sim *ARGS:
    cargo run --release -p unbroken-group --features faults --bin sim -- {{ARGS}}

demo *ARGS:
    cargo run --release -p unbroken-demo -- {{ARGS}}
