import os

# Threads that wait by spinning stop each other on a busy machine: small networks ran 10 times slower there.
# It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from submit.cli import main

if __name__ == "__main__":
    main()
