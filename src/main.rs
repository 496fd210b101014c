//! `lameduck`.

fn main() {}
