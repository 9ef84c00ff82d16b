"""Properties are checked on the same examples everywhere, however busy the machine."""

import hypothesis

hypothesis.settings.register_profile("topmass", deadline=None, derandomize=True)
hypothesis.settings.load_profile("topmass")
