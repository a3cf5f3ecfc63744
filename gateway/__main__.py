import sys

from gateway.ops.main import main

sys.exit(main())
