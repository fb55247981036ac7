//! Tells the binding which kind of Python it is built for.

fn main() {
    // If a build script names no input, a change of any file of the package, such as a page of the
    // documentation, compiles everything again.
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "python")]
    pyo3_build_config::use_pyo3_cfgs();
}
