"""QualityReport -> what people read: report.md, report.html and rows for a terminal."""
