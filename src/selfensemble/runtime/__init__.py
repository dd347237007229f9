"""What every run needs: files, checked configuration, provenance, interrupts, processes, memory."""
