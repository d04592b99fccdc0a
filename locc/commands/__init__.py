"""What the command line needs beside its commands: loading, method flags, tables."""
