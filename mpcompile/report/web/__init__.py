"""What the pages are made of: templates, styles and scripts, put together by `mpcompile.report.html`."""
