"""fastops against PyTorch, measured: `fastops bench`. One harness, one file a stem."""
