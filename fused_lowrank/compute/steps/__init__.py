"""Steps, of which plans are made: `library`, and `kernels`, which imports it."""
