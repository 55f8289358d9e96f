//! The repository keeps its own rules: what `cargo xtask tidy` finds is a failed test.

#[test]
fn tidy_finds_nothing() {
    let found = xtask::tidy::check(&xtask::tidy::repository_root()).unwrap();
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert!(lines.is_empty(), "\n{}\n", lines.join("\n"));
}
