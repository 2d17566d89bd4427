# What CI does, by hand: `just check`, `just test`, `just demo`.
check:
    cargo fmt --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo clippy --workspace --all-targets --features unbroken-tests/faults -- -D warnings

test:
    cargo test --workspace

sim *ARGS:
    cargo run --release -p unbroken-group --features faults --bin sim -- {{ARGS}}

# Shows that the tests can fail: see `just planted --help`.
planted *ARGS:
    cargo test --quiet --workspace --features unbroken-tests/faults --test planted -- {{ARGS}}

demo *ARGS:
    cargo run --release -p unbroken-demo -- {{ARGS}}
