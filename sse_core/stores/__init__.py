"""Events that outlive the process, or come from another."""
